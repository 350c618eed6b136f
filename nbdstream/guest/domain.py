# SPDX-License-Identifier: Apache-2.0
"""A guest as a domain of libvirt: what `nbdstream.guest.qemu` starts, in libvirt's XML
(https://libvirt.org/formatdomain.html)."""

import shutil
from xml.sax.saxutils import escape, quoteattr

from nbdstream.errors import UsageError
from nbdstream.guest.accelerator import Accelerator, qemu_binary

MiB = 1 << 20

# The domain is paused while the server is away, instead of seeing a broken disk.
_DOMAIN = """\
<domain type={kind}>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <boot dev='hd'/>
    <bios useserial='yes'/>
  </os>
  <features><acpi/></features>
  <cpu mode={cpu}/>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' discard='unmap' error_policy='stop' rerror_policy='stop'/>
      <source protocol='nbd'>
        <host transport='unix' socket={socket}/>
      </source>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='user'><model type='virtio'/></interface>
    <serial type='pty'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
"""


def domain_xml(name: str, socket: str, memory: int, accelerator: Accelerator) -> str:
    """The definition of a domain that boots from the NBD export at a Unix socket, with a network
    card behind QEMU's NAT and a serial console (``virsh console``).

    Args:
        name: the domain's name.
        socket: an absolute path.
        memory: bytes, in whole MiB.

    Raises:
        UsageError: QEMU is not installed.
    """
    emulator = shutil.which(qemu_binary())
    if emulator is None:
        raise UsageError(f"{qemu_binary()} is not installed (qemu-system-x86)")
    kvm = accelerator == "kvm"
    return _DOMAIN.format(
        kind=quoteattr("kvm" if kvm else "qemu"),
        name=escape(name),
        memory=memory // MiB,
        cpu=quoteattr("host-passthrough" if kvm else "maximum"),
        emulator=escape(emulator),
        socket=quoteattr(socket),
    )
