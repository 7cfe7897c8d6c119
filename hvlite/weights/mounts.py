"""Which file systems cannot hold what hvlite must be able to trust: network shares, and Windows drives under WSL.

They neither keep the order of writes nor map files reliably, and reading a block for each step over them is slow. No
torch: whoever keeps files of that kind may ask.
"""

import re
from pathlib import Path, PurePosixPath

from hvlite.telemetry import MOUNTS, mount_of

NETWORK = "a network file system"
WINDOWS = "a Windows drive or a share of a virtual machine's host"
UNFIT = {
    **dict.fromkeys(("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "davfs"), NETWORK),
    **dict.fromkeys(("ceph", "glusterfs", "lustre", "beegfs", "gpfs", "orangefs", "pvfs2"), NETWORK),
    **dict.fromkeys(("9p", "drvfs", "vboxsf", "vmhgfs", "prl_fs", "fuse.vmhgfs-fuse"), WINDOWS),
}
NETWORK_FUSE = re.compile(
    r"fuse\.(sshfs|rclone|s3fs|gcsfuse|glusterfs|ceph|davfs2?|curlftpfs|juicefs|goofys|smbnetfs)$"
)


def unfit_file_system(path: Path, mounts: str | None = None) -> str | None:
    """Why `path`, which need not be there yet, lies where hvlite keeps no such files; None if it may.

    `mounts` is the content of /proc/mounts; where that cannot be read, every place may.
    """
    if mounts is None:
        try:
            mounts = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
    mount, kind = mount_of(PurePosixPath(path.resolve()), mounts)
    reason = NETWORK if NETWORK_FUSE.match(kind) else UNFIT.get(kind)
    return None if reason is None else f"{path} lies on {mount}, {reason} ({kind})"
