//! The programs of a network link: tcx where the kernel has it (6.6), clsact before.

use std::collections::HashSet;
use std::fs;
use std::hash::Hasher;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::programs::ProgramError;
use aya::programs::tc::{
    NlOptions, SchedClassifier, SchedClassifierLink, TcAttachOptions, TcAttachType, TcError,
    TcHandle, qdisc_add_clsact,
};
use fnv::FnvHasher;

use super::links::PinnedLinks;
use super::load::shortened;
use super::order::{Chain, Neighbours};
use super::qdisc;
use super::sys::{self, AttachPoint, Order};
use crate::links::Role;

/// How programs are attached to network links.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum TcMode {
    /// tcx where the kernel has it, clsact otherwise
    Auto,
    /// tcx links (Linux 6.6)
    Tcx,
    /// Filters of a clsact qdisc
    Clsact,
}

/// The pin of a program at egress that stands before those of others.
const FIRST: &str = "egress";
/// The pin of one that stands behind them.
const LAST: &str = "last";

/// Direction, pin and the kernel's number of the tcx hook. Egress first: a packet that is translated
/// on its way there must find its answer translated.
const HOOKS: [(TcAttachType, &str, u32); 2] = [
    (TcAttachType::Egress, FIRST, sys::TCX_EGRESS),
    (TcAttachType::Ingress, "ingress", sys::TCX_INGRESS),
];

/// The programs of a link, in the order of [`HOOKS`], as far as it has any.
const fn programs(role: Role) -> &'static [&'static str] {
    match role {
        Role::Uplink => &["portal_upegress", "portal_uplink"],
        Role::Tunnel => &["portal_l3egress", "portal_l3uplink"],
        Role::CatchAll | Role::Child => &["portal_upegress"],
        Role::Pod | Role::Ignore => &["portal_egress", "portal_ingress"],
    }
}

/// The program that does the same as another behind those of others, at egress.
fn last_of(program: &str) -> Option<&'static str> {
    match program {
        "portal_egress" => Some("portal_last"),
        "portal_upegress" => Some("portal_uplast"),
        _ => None,
    }
}

/// Whether a program is only loaded once there are programs of others.
pub fn is_for_neighbours(program: &str) -> bool {
    ["portal_last", "portal_uplast"].contains(&program)
}

/// How programs are attached to a node's links, and as whose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// By what; never [`TcMode::Auto`].
    pub mode: TcMode,
    /// Our filters' handle, by which they are found again.
    handle: TcHandle,
}

/// The first among clsact filters, since any may end the chain.
const PRIORITY: u16 = 1;

/// The handle of filters of agents before: of all of them, whatever their pins.
pub const OLD_HANDLE: TcHandle = TcHandle::new(0, 0x706f);

/// The handle of the filters that belong to a folder of pins, whatever it is called here: an agent with other pins has
/// others, and neither touches what is the other's.
pub fn handle_of(bpffs_root: &Path) -> Result<TcHandle> {
    let folder = fs::metadata(bpffs_root)
        .with_context(|| format!("cannot look at {}", bpffs_root.display()))?;
    let mut hasher = FnvHasher::default();
    hasher.write_u64(folder.dev());
    hasher.write_u64(folder.ino());
    let hash = hasher.finish();
    // Zero stands for a handle of the kernel's choice.
    let [a, b, ..] = (hash ^ hash >> 32).to_le_bytes();
    Ok(TcHandle::new(0, u16::from_le_bytes([a, b]).max(1)))
}

/// Decides how to attach.
pub fn resolve(mode: TcMode, bpffs_root: &Path, ebpf: &Ebpf) -> Result<Place> {
    Ok(Place { mode: resolve_mode(mode, ebpf)?, handle: handle_of(bpffs_root)? })
}

/// By trying on nothing: a link index that does not exist.
fn resolve_mode(mode: TcMode, ebpf: &Ebpf) -> Result<TcMode> {
    if mode == TcMode::Clsact {
        return Ok(mode);
    }
    let program = ebpf.program("portal_ingress").context("the object has no portal_ingress")?;
    let program: &SchedClassifier = program.try_into()?;
    let (ifindex, order) = (u32::MAX >> 1, Order::First);
    let at = AttachPoint::Tcx { ifindex, attach_type: sys::TCX_INGRESS, order };
    // A kernel with tcx looks for the link; one without does not know the attach type.
    let has_tcx = match sys::link_create(program.fd()?, at) {
        Err(error) => error.raw_os_error() == Some(libc::ENODEV),
        Ok(_) => true,
    };
    anyhow::ensure!(
        has_tcx || mode == TcMode::Auto,
        "this kernel has no tcx, which came with Linux 6.6. Do without --tc=tcx: clsact then serves"
    );
    Ok(if has_tcx { TcMode::Tcx } else { TcMode::Clsact })
}

/// What attaching to network links takes.
pub struct Links<'a> {
    /// The programs.
    pub ebpf: &'a mut Ebpf,
    /// The pins of tcx links.
    pub pins: &'a mut PinnedLinks,
    /// What is known of others' programs.
    pub neighbours: &'a mut Neighbours,
    /// How, and as whose.
    pub place: Place,
}

impl Links<'_> {
    /// Attaches a link's programs, or renews them there. Says how many were not there.
    pub fn attach(&mut self, ifindex: u32, role: Role) -> Result<usize> {
        let mut fresh = 0;
        for (program, (direction, side, attach_type)) in programs(role).iter().zip(HOOKS) {
            let is_fresh = if self.place.mode == TcMode::Clsact {
                let handle = self.place.handle;
                attach_filter(self.loaded(program)?, handle, ifindex, direction)
            } else if let Some(last) = last_of(program) {
                self.attach_in_order(ifindex, [program, last])
            } else {
                let at = AttachPoint::Tcx { ifindex, attach_type, order: Order::First };
                self.ensure(program, &pin(ifindex, side), at)
            };
            let is_fresh = is_fresh.with_context(|| {
                format!("cannot attach to {side} of the link with index {ifindex}")
            })?;
            fresh += usize::from(is_fresh);
        }
        Ok(fresh)
    }

    /// Attaches one of two programs that do the same at egress, the first before others or the second behind them. True if none of them
    /// was there.
    fn attach_in_order(&mut self, ifindex: u32, [first, last]: [&str; 2]) -> Result<bool> {
        let (first_pin, last_pin) = (pin(ifindex, FIRST), pin(ifindex, LAST));
        let ours = [&first_pin, &last_pin].map(|pin| self.pins.program(pin));
        let now = match ours {
            [Some(_), _] => Some(Order::First),
            [None, Some(_)] => Some(Order::Last),
            [None, None] => None,
        };
        let ours: Vec<u32> = ours.into_iter().flatten().collect();
        let chain = Chain::read(ifindex, &ours)?;
        let mut is_fresh = false;
        for order in self.neighbours.steps(ifindex, &chain, now) {
            let (program, here, there) = match order {
                Order::First => (first, &first_pin, &last_pin),
                Order::Last => (last, &last_pin, &first_pin),
            };
            let at = AttachPoint::Tcx { ifindex, attach_type: sys::TCX_EGRESS, order };
            is_fresh |= self.ensure(program, here, at)?;
            self.pins.remove(there);
        }
        self.neighbours.settle(ifindex, &chain);
        Ok(is_fresh && !chain.has_ours())
    }

    fn ensure(&mut self, program: &str, pin: &str, at: AttachPoint) -> Result<bool> {
        let fd = self.loaded(program)?.fd()?.try_clone()?;
        self.pins.ensure(pin, fd, at)
    }

    /// A program; one that few links need is loaded now.
    fn loaded(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        let program = self.ebpf.program_mut(name);
        let program: &mut SchedClassifier =
            program.with_context(|| format!("the object has no program {name}"))?.try_into()?;
        if program.fd().is_err() {
            program.load().map_err(shortened).with_context(|| format!("program {name}"))?;
        }
        Ok(program)
    }
}

/// The name of a pin. By index and not by name: a link's name may hold a dot, which bpffs refuses, and
/// is often changed right after the link was made.
fn pin(ifindex: u32, side: &str) -> String {
    format!("tc-{ifindex}-{side}")
}

/// The links that have pins.
fn pinned(links: &PinnedLinks) -> HashSet<u32> {
    let index = |name: String| name.strip_prefix("tc-")?.split('-').next()?.parse().ok();
    links.names().into_iter().filter_map(index).collect()
}

/// Takes all programs off links that are not `attached`, and off all links those that are attached in
/// the other mode.
pub fn detach_others(links: &mut PinnedLinks, place: Place, attached: &HashSet<u32>) {
    let stays = |by: TcMode, ifindex: u32| place.mode == by && attached.contains(&ifindex);
    for ifindex in pinned(links).into_iter().filter(|ifindex| !stays(TcMode::Tcx, *ifindex)) {
        detach(links, Place { mode: TcMode::Tcx, ..place }, ifindex);
    }
    remove_filters(place.handle, |ifindex| stays(TcMode::Clsact, ifindex));
}

/// Takes both programs off a link.
pub fn detach(links: &mut PinnedLinks, place: Place, ifindex: u32) {
    if place.mode == TcMode::Tcx {
        ["ingress", LAST, FIRST].iter().for_each(|side| links.remove(&pin(ifindex, side)));
        return;
    }
    for (direction, ..) in HOOKS {
        if let Ok(name) = name_of(ifindex) {
            remove_filter(&name, place.handle, direction);
        }
    }
}

/// The name that a link has now: links are often renamed right after they were made.
fn name_of(ifindex: u32) -> Result<String> {
    let name = nix::net::if_::if_indextoname(ifindex)?;
    name.into_string().context("its name is not UTF-8")
}

/// True if the filter was not there.
fn attach_filter(
    program: &mut SchedClassifier,
    handle: TcHandle,
    ifindex: u32,
    direction: TcAttachType,
) -> Result<bool> {
    let name = &name_of(ifindex)?;
    anyhow::ensure!(
        !qdisc::has_ingress_only(ifindex).context("cannot ask for its qdisc")?,
        "{name} has an ingress qdisc of another's, which has no place for programs where packets leave"
    );
    if let Err(error) = qdisc_add_clsact(name)
        && !exists(&error)
    {
        return Err(error).context("cannot add a clsact qdisc");
    }
    let options = NlOptions { priority: PRIORITY, handle, ..NlOptions::default() };
    let mut is_fresh = true;
    let id = match program.attach_with_options(name, direction, TcAttachOptions::Netlink(options)) {
        Ok(id) => id,
        Err(ProgramError::TcError(error)) if exists(&error) => {
            // An earlier agent's filter: only its program is replaced.
            is_fresh = false;
            let link = SchedClassifierLink::attached(name, direction, PRIORITY, handle, None)?;
            program.attach_to_link(link)?
        }
        Err(error) => return Err(error.into()),
    };
    // Dropping the link would take the filter off.
    std::mem::forget(program.take_link(id)?);
    Ok(is_fresh)
}

/// Whether the kernel has the qdisc or the filter already. A clsact qdisc of another's serves as well.
fn exists(error: &TcError) -> bool {
    match error {
        TcError::NetlinkError(error) => error.raw_os_error() == Some(libc::EEXIST),
        _ => false,
    }
}

fn remove_filter(name: &str, handle: TcHandle, direction: TcAttachType) {
    // Dropping a link takes its filter off. A link that is gone has taken it along.
    drop(SchedClassifierLink::attached(name, direction, PRIORITY, handle, None));
}

/// Removes our clsact filters from all links of this network namespace but those that keep theirs.
pub fn remove_filters(handle: TcHandle, keeps: impl Fn(u32) -> bool) {
    let Ok(interfaces) = nix::net::if_::if_nameindex() else { return };
    for interface in interfaces.iter().filter(|interface| !keeps(interface.index())) {
        let name = interface.name().to_string_lossy();
        HOOKS.iter().for_each(|(direction, ..)| remove_filter(&name, handle, *direction));
    }
}
