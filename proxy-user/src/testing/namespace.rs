//! Network and mount namespaces, held by descriptors.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use super::offload;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace. It lives as long as a handle, a socket or a process in it.
#[derive(Clone, Debug)]
pub struct Namespace {
    fd: Arc<OwnedFd>,
}

impl Namespace {
    /// A new, empty network namespace with its loopback up.
    pub fn new() -> Self {
        let fd = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("network namespaces need root");
            File::open("/proc/thread-self/ns/net").expect("procfs is mounted")
        });
        let namespace = Self { fd: Arc::new(fd.into()) };
        // Link-local addresses are ours alone: no need to wait for duplicate address detection.
        namespace.sysctl("net/ipv6/conf/all/accept_dad", "0");
        namespace.sysctl("net/ipv6/conf/default/accept_dad", "0");
        namespace.netlink(async |net| net.up("lo").await);
        namespace
    }

    /// Runs `f` in this namespace, on a thread of its own.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        in_thread(|| {
            self.enter();
            f()
        })
    }

    /// Moves the calling thread into this namespace.
    pub fn enter(&self) {
        setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET).expect("the namespace is there");
    }

    /// The namespace's descriptor.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Sets a sysctl under `/proc/sys`.
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{name}");
        self.run(|| fs::write(&path, value).unwrap_or_else(|e| panic!("{path} = {value}: {e}")));
    }

    /// Gives the namespace these nft rules and no others.
    pub fn firewall(&self, rules: &str) {
        self.run(|| {
            let mut nft = Command::new("nft");
            let nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn();
            let mut nft = nft.expect("nft is installed");
            let mut stdin = nft.stdin.take().expect("a pipe");
            write!(stdin, "flush ruleset\n{rules}").expect("nft reads");
            drop(stdin);
            assert!(nft.wait().expect("nft ends").success(), "nft refuses:\n{rules}");
        });
    }

    /// The connections that the kernel follows here, a line each.
    pub fn connections(&self) -> Vec<String> {
        let read = || fs::read_to_string("/proc/thread-self/net/nf_conntrack");
        let text = self.run(read).expect("this kernel lists connections");
        text.lines().map(str::to_owned).collect()
    }

    /// Switches what a link does for the stack on or off: checksums and the cutting of segments.
    pub fn offload(&self, link: &str, on: bool) {
        self.run(|| offload::set(link, on).unwrap_or_else(|e| panic!("offload of {link}: {e}")));
    }

    /// Configures links, addresses and routes in this namespace.
    pub fn netlink<T: Send>(&self, f: impl AsyncFnOnce(super::net::Net) -> T + Send) -> T {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
                let connection = tokio::spawn(connection);
                let result = f(super::net::Net { handle }).await;
                connection.abort();
                result
            })
        })
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

/// A mount namespace in which `/mnt` is an empty file system of its own.
#[derive(Clone, Debug)]
pub struct Mounts {
    fd: Arc<OwnedFd>,
}

impl Mounts {
    /// A new mount namespace. Nothing mounted in it is seen elsewhere.
    pub fn new() -> Self {
        let fd = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("mount namespaces need root");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
            mount(Some("portal"), "/mnt", Some("tmpfs"), MsFlags::empty(), none).expect("tmpfs");
            File::open("/proc/thread-self/ns/mnt").expect("procfs is mounted")
        });
        Self { fd: Arc::new(fd.into()) }
    }

    /// Runs `f` where these mounts are seen, on a thread of its own.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        in_thread(|| {
            // A thread that shares its root directory with others may not change its mounts.
            unshare(CloneFlags::CLONE_FS).expect("a thread may");
            setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNS).expect("the namespace is there");
            f()
        })
    }

    /// Mounts a BPF file system at `path`, which is made.
    pub fn bpffs(&self, path: &str) {
        self.run(|| {
            fs::create_dir_all(path).expect("a folder under /mnt");
            let none = None::<&str>;
            mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), none).expect("bpffs");
        });
    }

    /// The namespace's descriptor.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl Default for Mounts {
    fn default() -> Self {
        Self::new()
    }
}

fn in_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(f).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
