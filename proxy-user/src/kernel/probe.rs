//! What this machine offers: asked, not guessed from version numbers.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};
use aya::programs::ProgramType;
use aya::sys::is_helper_supported;
use aya_obj::generated::bpf_func_id;
use nix::sys::statfs::{FsType, fstatfs};

use super::Options;
use super::sys::{Classifier, Instruction};

const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// Checks what the datapath needs before anything is touched.
///
/// # Errors
/// Says what is missing and what to do.
pub fn preconditions(options: &Options) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "portal needs root: it loads eBPF programs. Run it with sudo, or as a privileged pod"
    );
    let root = existing_parent(&options.bpffs_root);
    ensure!(
        file_system(&root)? == BPF_FS_MAGIC,
        "{} is not on a BPF file system, which keeps the datapath alive between agents. \
         Mount one: mount -t bpf bpf /sys/fs/bpf (or choose another place with --bpffs-root)",
        options.bpffs_root.display()
    );
    let Some(cgroup) = options.cgroup_root.as_ref().filter(|_| options.socket_lb.is_on()) else {
        return Ok(());
    };
    ensure!(
        file_system(cgroup)? == CGROUP2_MAGIC,
        "{} is not a cgroup2 directory, which the node's own sockets are translated by. Name one \
         with --cgroup-root, or do without: --socket-lb=off",
        cgroup.display()
    );
    Ok(())
}

fn existing_parent(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn file_system(path: &Path) -> Result<i64> {
    let directory =
        fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let FsType(magic) = fstatfs(directory.as_fd())
        .with_context(|| format!("cannot ask for the file system of {}", path.display()))?
        .filesystem_type();
    Ok(magic)
}

/// Where the cgroup2 hierarchy is mounted.
///
/// # Errors
/// If it is nowhere.
pub fn cgroup2_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mount table")?;
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, place, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(place))
    });
    match mount {
        Some(mount) => Ok(mount),
        None => bail!(
            "cgroup2 is not mounted, which the node's own sockets are translated by. Mount it: \
             mount -t cgroup2 none /sys/fs/cgroup (or do without: --socket-lb=off)"
        ),
    }
}

/// Whether socket hooks may use `bpf_set_retval` (5.18), so that a refusal is "connection refused".
pub fn socket_errno() -> bool {
    let helper = bpf_func_id::BPF_FUNC_set_retval;
    is_helper_supported(ProgramType::CgroupSockAddr, helper).unwrap_or(false)
}

/// Whether `bpf_l4_csum_replace` knows `BPF_F_IPV6` (6.16, and some stable kernels before): tried on a packet.
pub fn ipv6_sums() -> bool {
    const L4_CSUM_REPLACE: i32 = 11;
    const PSEUDO_HDR_AND_IPV6: i32 = 1 << 4 | 1 << 7;
    const MOVE: u8 = 0xb7;
    let set =
        |register, immediate| Instruction { code: MOVE, registers: register, offset: 0, immediate };
    let program = [
        // The packet is in the first register. Offset, from, to, flags:
        set(2, 16),
        set(3, 0),
        set(4, 1),
        set(5, PSEUDO_HDR_AND_IPV6),
        Instruction { code: 0x85, registers: 0, offset: 0, immediate: L4_CSUM_REPLACE },
        Instruction { code: 0x95, registers: 0, offset: 0, immediate: 0 },
    ];
    Classifier::load(&program).and_then(|program| program.run()).is_ok_and(|result| result == 0)
}

/// How socket hooks know the node's own sockets, which the calling thread's namespace has: by its cookie
/// (`SO_NETNS_COOKIE`, 5.14), or because it is the machine's first one.
pub fn own_namespace() -> OwnNamespace {
    match netns_cookie() {
        Ok(cookie) => OwnNamespace::Cookie(cookie),
        // Settings of all namespaces show in the first one only.
        Err(_) if Path::new("/proc/sys/net/core/dev_weight").exists() => OwnNamespace::Initial,
        Err(error) => OwnNamespace::Unknown(error),
    }
}

/// How a network namespace is known in the kernel.
pub enum OwnNamespace {
    /// By its cookie.
    Cookie(u64),
    /// It is the first one.
    Initial,
    /// Not at all.
    Unknown(std::io::Error),
}

/// The cookie of our network namespace (5.14), by which socket hooks know the node's own sockets.
///
/// # Errors
/// If the kernel does not tell.
fn netns_cookie() -> std::io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0))
        .or_else(|_| std::net::UdpSocket::bind(("::1", 0)))?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).expect("eight");
    // SAFETY: the pointers are to live variables of the option's type and size.
    let result = unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(std::io::Error::last_os_error()) }
}

/// Whether tc sees packets that come in by an IP tunnel without their outer headers: from Linux 5.14 on.
pub fn shows_inner_packets() -> bool {
    static RELEASE: LazyLock<Option<(u32, u32)>> = LazyLock::new(|| {
        let release = nix::sys::utsname::uname().ok()?;
        version(release.release().to_str()?)
    });
    // Of a release that can't be read the newest is assumed.
    RELEASE.is_none_or(|release| release >= (5, 14))
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn a_release_begins_with_two_numbers() {
        assert_eq!(version("5.10.0-28-amd64"), Some((5, 10)));
        assert_eq!(version("6.18.3"), Some((6, 18)));
        assert_eq!(version("6.1-rc1"), Some((6, 1)));
        assert_eq!(version("unknown"), None);
    }
}
