"""Which file systems cannot hold what hvlite must be able to trust: network shares, and Windows drives under WSL.

They neither keep the order of writes nor map files reliably, and reading a block for each step over them is slow. No
torch: whoever keeps files of that kind may ask.
"""

import re
from pathlib import Path, PurePosixPath

MOUNTS = Path("/proc/mounts")

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
    mount, kind = _mount_of(PurePosixPath(path.resolve()), mounts)
    reason = NETWORK if NETWORK_FUSE.match(kind) else UNFIT.get(kind)
    return None if reason is None else f"{path} lies on {mount}, {reason} ({kind})"


def _mount_of(path: PurePosixPath, mounts: str) -> tuple[PurePosixPath, str]:
    """Where the file system that holds `path` is mounted, and its kind; of two at one place, the later one shows."""
    best = PurePosixPath("/"), ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = PurePosixPath(_unescaped(fields[1]))
        if path.is_relative_to(mount) and len(mount.parts) >= len(best[0].parts):
            best = mount, fields[2]
    return best


def _unescaped(field: str) -> str:
    """Spaces and their like stand in /proc/mounts as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
