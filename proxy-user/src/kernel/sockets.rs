//! The socket hooks, at a cgroup.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::programs::{CgroupSockAddr, Program};

use super::Options;
use super::links::PinnedLinks;
use super::sys::AttachPoint;

/// Which sockets are translated when they connect or send.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum SocketLb {
    /// None: the node's own traffic to Services is not served
    Off,
    /// Those of the node's own network namespace
    Host,
    /// Those of all pods too (not with sidecars, VMs or sandboxed pods)
    All,
}

impl SocketLb {
    /// Whether any sockets are translated.
    pub const fn is_on(self) -> bool {
        !matches!(self, Self::Off)
    }
}

/// Program, pin and the kernel's number of the hook (`enum bpf_attach_type`).
const HOOKS: [(&str, &str, u32); 8] = [
    ("portal_connect4", "cgroup-connect4", 10),
    ("portal_connect6", "cgroup-connect6", 11),
    ("portal_sendmsg4", "cgroup-sendmsg4", 14),
    ("portal_sendmsg6", "cgroup-sendmsg6", 15),
    ("portal_recvmsg4", "cgroup-recvmsg4", 19),
    ("portal_recvmsg6", "cgroup-recvmsg6", 20),
    ("portal_getpeer4", "cgroup-getpeername4", 29),
    ("portal_getpeer6", "cgroup-getpeername6", 30),
];

/// Attaches the hooks, or takes off those that an earlier agent left if they are not wanted. Says how many were not
/// there.
pub fn attach(ebpf: &mut Ebpf, links: &mut PinnedLinks, options: &Options) -> Result<usize> {
    let Some(root) = options.cgroup_root.as_ref().filter(|_| options.socket_lb.is_on()) else {
        HOOKS.iter().for_each(|(_, pin, _)| links.remove(pin));
        return Ok(0);
    };
    let directory = File::open(root).with_context(|| format!("cannot open {}", root.display()))?;
    let id = directory.metadata()?.ino();
    let mut fresh = 0;
    for (name, pin, attach_type) in HOOKS {
        let program = program(ebpf, name)?;
        let at = AttachPoint::Cgroup { directory: directory.as_raw_fd(), id, attach_type };
        let is_fresh = links
            .ensure(pin, program.fd()?, at)
            .with_context(|| format!("cannot attach {name} to cgroup {}", root.display()))?;
        fresh += usize::from(is_fresh);
    }
    Ok(fresh)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut CgroupSockAddr> {
    let program: &mut Program =
        ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    Ok(program.try_into()?)
}
