# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with an image on a web server. Each message is one line."""

# How nbdstream is told (`nbdstream.backing.helper`): by a line on standard error that begins so.
# The image is refused for good; something is worth a warning.
REFUSES, WARNS = "refused: ", "warning: "


class WebError(Exception):
    """The server's answer cannot be used, or there is none. A later one may be better."""


class ReplacedError(WebError):
    """The server has another image now. No byte is read of it, now or later."""


class SettingsError(WebError):
    """The user's file of settings makes no sense."""


class LinkError(WebError):
    """A transfer ended early. What came before is good: the rest can be asked for again."""
