//! The kernel side: the only code that loads programs, attaches them and writes maps.
//!
//! ```text
//! <bpffs root>/maps/<map>              every map of the contract
//! <bpffs root>/links/tc-<ifindex>-<direction>, cgroup-<hook>
//! ```
//!
//! All of it is pinned, so it outlives the agent; a new agent finds it, puts its own programs into the
//! links (between one packet and the next) and goes on with the maps.

mod abandoned;
mod ask;
mod caught;
pub mod clock;
mod conntrack;
mod contract;
mod counts;
mod interest;
mod links;
mod load;
mod mapped;
mod order;
pub mod probe;
mod qdisc;
pub mod read;
mod short_cuts;
mod silent;
mod sockets;
mod sweep;
pub(crate) mod sys;
mod tails;
mod tc;
pub(crate) mod verdicts;
mod ways;
mod writer;
mod xdp;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::Ebpf;
use aya_log::EbpfLogger;
use ipnet::IpNet;
use nix::fcntl::{Flock, FlockArg};
use proxy_common::Outcome;
use proxy_common::settings::Lifetimes;
use proxy_common::tables::{Interest, Ports};

use crate::exits::Exits;
use crate::links::Role;
use crate::plan::{Capacity, Op, Planner, Use};
use crate::routes::Routes;
pub use abandoned::Abandoned;
pub use contract::{Shape, name_of, shapes};
use links::PinnedLinks;
pub use load::has_object;
use order::Neighbours;
use short_cuts::Wishes;
pub use short_cuts::{Granted, Granting, Keys};
pub use sockets::SocketLb;
pub use sweep::{Sweep, Swept};
use tails::Tails;
pub use tc::TcMode;
use writer::Writer;
use xdp::Relays;
pub use xdp::XdpMode;

/// After more writes at once than this the tables' memory is given back: it counts as the agent's.
const MANY: usize = 1024;

/// Where and how the datapath is installed.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent settings, each with a name")]
pub struct Options {
    /// The folder for pins, on a bpffs.
    pub bpffs_root: PathBuf,
    /// The cgroup whose sockets are translated.
    pub cgroup_root: Option<PathBuf>,
    /// Which sockets are translated.
    pub socket_lb: SocketLb,
    /// How programs are attached to network links.
    pub tc: TcMode,
    /// Which uplinks get XDP.
    pub xdp: XdpMode,
    /// How much the tables hold; fixed when the maps are made.
    pub sizes: Sizes,
    /// How long flows live.
    pub lifetimes: Lifetimes,
    /// For how many ticks after the first start connections to VIPs that are under way are left to the kernel.
    pub takeover_grace: u32,
    /// The first and the last source port that may take the place of a client's.
    pub masquerade_ports: (u16, u16),
    /// Whether refused and dropped packets are logged.
    pub trace: bool,
    /// Whether pods' flows to `ClusterIPs` are masqueraded too.
    pub masquerade_all: bool,
    /// Whether what pods send out of the cluster is masqueraded.
    pub masquerade_pods: bool,
    /// Whether flows may take a short cut past the host stack.
    pub short_cut: bool,
    /// Index of the link by which comes in again what is translated where it leaves; 0 if there is none.
    pub catch_all: u32,
    /// How many TCP flows may begin in a second, as one CPU sees them come in at XDP, before clients are challenged; 0: they
    /// never are.
    pub syn_guard: u32,
    /// Whether VIPs answer ICMP echo.
    pub vip_ping: bool,
    /// The pods' ranges, by which pods of other nodes are known; the first of each family counts.
    pub cluster_cidrs: Vec<IpNet>,
}

/// How much the tables hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// What Services take.
    pub tables: Capacity,
    /// Records of live flows, of each family.
    pub flows: u32,
    /// Records of other flows, of each family, at least.
    pub embryos: u32,
    /// Clients with affinity, and addresses that sockets asked for, of each family, at least.
    pub others: u32,
}

impl Sizes {
    /// For most nodes.
    pub const DEFAULT: Self =
        Self { tables: Capacity::DEFAULT, flows: 262_144, embryos: 262_144, others: 65_536 };
    /// For very large clusters.
    pub const LARGE: Self =
        Self { tables: Capacity::LARGE, flows: 1_048_576, embryos: 524_288, others: 65_536 };
    /// For small nodes.
    pub const SMALL: Self =
        Self { tables: Capacity::SMALL, flows: 32_768, embryos: 32_768, others: 8_192 };

    /// The kernel memory that the maps take before there is any Service or flow, in megabytes: arrays, the
    /// elements of LRU tables and the buckets of hashes are made at once.
    pub fn megabytes(&self) -> u64 {
        let Self { tables, flows, embryos, others } = *self;
        let bytes = |count: u32, each: u64| u64::from(count) * each;
        let arrays = bytes(tables.slots, 4)
            + bytes(tables.backends, 24 + 40 + 2 * 8)
            + bytes(tables.services, 8 + 16)
            + 2 * (size_of::<Interest>() * Interest::COUNT) as u64
            + (size_of::<Ports>() * Ports::COUNT) as u64;
        // Elements of both families, with the kernel's header of 48 bytes, and 16 for each bucket.
        let lru = bytes(embryos, 120 + 168 + 2 * 16)
            + bytes(others, 80 + 96 + 72 + 104 + 4 * 16)
            + bytes(others / 4, 72 + 96 + 2 * 16);
        let buckets = bytes(flows, 2 * 16) + bytes(tables.services, 3 * 16);
        (arrays + lru + buckets) / 1_000_000
    }
}

/// The installed datapath.
pub struct Datapath {
    ebpf: Ebpf,
    tails: Tails,
    links: PinnedLinks,
    writer: Writer,
    wishes: Wishes,
    tc: tc::Place,
    neighbours: Neighbours,
    relays: Relays,
    /// The network links that this agent has attached to.
    attached: HashMap<u32, Role>,
    options: Options,
    maps: PathBuf,
    max_flows: usize,
    /// When the last sweep began, in ticks.
    swept_at: u32,
    /// Held while this agent runs.
    _lock: Flock<OwnedFd>,
}

/// The folder of the pinned maps.
pub fn maps_folder(bpffs_root: &Path) -> PathBuf {
    bpffs_root.join("maps")
}

fn links_folder(bpffs_root: &Path) -> PathBuf {
    bpffs_root.join("links")
}

impl Datapath {
    /// Loads the programs and attaches the socket hooks, taking over what an earlier agent left.
    /// Returns the planner for what the maps hold.
    ///
    /// # Errors
    /// Says what is missing and what to do. Nothing is attached then that was not before.
    pub fn install(options: &Options) -> Result<(Self, Planner)> {
        probe::preconditions(options)?;
        let maps = maps_folder(&options.bpffs_root);
        fs::create_dir_all(&maps).with_context(|| format!("cannot make {}", maps.display()))?;
        let lock = lock(&options.bpffs_root)?;
        let mut ebpf = load::load(options, &maps)?;
        let mut links = PinnedLinks::new(links_folder(&options.bpffs_root))?;
        let mut writer = Writer::open(&maps)?;
        let wishes = Wishes::open(&maps)?;
        let relays = Relays::open(options.xdp, options.syn_guard != 0, &maps)?;
        let tc = tc::resolve(options.tc, &options.bpffs_root, &ebpf)?;
        let tails = Tails::install(&mut ebpf, &links_folder(&options.bpffs_root))?;
        let planner = recover(&mut writer)?;
        // Last, so that nothing is attached if anything fails.
        let before = links.names();
        if let Err(error) = sockets::attach(&mut ebpf, &mut links, options) {
            let fresh = links.names().into_iter().filter(|name| !before.contains(name));
            fresh.for_each(|name| links.remove(&name));
            tails.remove();
            return Err(error);
        }
        let (attached, options) = (HashMap::new(), options.clone());
        let max_flows = writer::open(&maps, "flows_v4")?.info()?.max_entries() as usize;
        Ok((
            Self {
                ebpf,
                tails,
                links,
                writer,
                wishes,
                tc,
                neighbours: Neighbours::default(),
                relays,
                attached,
                options,
                maps,
                max_flows,
                swept_at: 0,
                _lock: lock,
            },
            planner,
        ))
    }

    /// Reads back what the maps hold, after the kernel has refused a write. Returns the planner for it. Only
    /// when nothing that was given up meanwhile can have a reader any more.
    ///
    /// # Errors
    /// If the maps can't be read, or what makes no sense in them can't be removed.
    pub fn recover(&mut self) -> Result<Planner> {
        recover(&mut self.writer)
    }

    /// What the programs log; of use with [`Options::trace`], and once.
    ///
    /// # Errors
    /// If it was taken before.
    pub fn take_log(&mut self) -> Result<EbpfLogger<&'static dyn log::Log>> {
        EbpfLogger::init(&mut self.ebpf).context("cannot open the programs' log")
    }

    /// How much the tables hold.
    pub fn capacity(&self) -> Capacity {
        self.writer.capacity()
    }

    /// Carries out planned writes, in their order.
    ///
    /// # Errors
    /// If the kernel refuses one; those before it were carried out.
    pub fn apply(&mut self, ops: &[Op]) -> Result<()> {
        let result = ops.iter().try_for_each(|op| self.writer.apply(op));
        if ops.len() > MANY {
            self.writer.unmap();
        }
        result
    }

    /// Takes in which ways lead to backends: for those written from now on. Says where that has changed.
    pub fn set_routes(&mut self, routes: &Routes) -> HashSet<IpAddr> {
        self.writer.set_routes(routes)
    }

    /// Forgets the ways to all other addresses.
    pub fn keep_routes(&mut self, wanted: &HashSet<IpAddr>) {
        self.writer.keep_routes(wanted);
    }

    /// Says by which addresses is masqueraded what leaves by each link.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_exits(&mut self, exits: &Exits) -> Result<()> {
        self.writer.set_exits(exits)
    }

    /// Attaches the datapath to a link, or renews it there. Says how many programs were not there.
    ///
    /// # Errors
    /// If the kernel refuses, most often because the link has just gone.
    pub fn attach(&mut self, ifindex: u32, role: Role) -> Result<usize> {
        if role == Role::Tunnel {
            self.tails.add_tunnels(&mut self.ebpf)?;
        }
        let mut links = tc::Links {
            ebpf: &mut self.ebpf,
            pins: &mut self.links,
            neighbours: &mut self.neighbours,
            place: self.tc,
        };
        let fresh = links.attach(ifindex, role)?;
        if role == Role::Uplink {
            self.relays.attach(&mut self.ebpf, &mut self.links, ifindex);
        }
        self.attached.insert(ifindex, role);
        Ok(fresh)
    }

    /// Detaches the datapath from a link that is gone or has another role.
    pub fn detach(&mut self, ifindex: u32) {
        if self.attached.remove(&ifindex).is_none_or(|role| role == Role::Uplink) {
            self.relays.detach(&mut self.links, ifindex);
        }
        self.neighbours.forget(ifindex);
        tc::detach(&mut self.links, self.tc, ifindex);
    }

    /// Whether the datapath is attached to a link.
    pub fn is_attached(&self, ifindex: u32) -> bool {
        self.attached.contains_key(&ifindex)
    }

    /// Whether others may need the place of our programs on a link, and can have it first, since the second line serves.
    pub fn leaves_room(&self) -> bool {
        self.tc.mode == TcMode::Clsact && self.options.catch_all != 0
    }

    /// The links that the datapath is attached to.
    pub fn attached(&self) -> Vec<(u32, Role)> {
        self.attached.iter().map(|(ifindex, role)| (*ifindex, *role)).collect()
    }

    /// Looks after the links with XDP; to be called each second.
    pub fn watch_relays(&mut self) {
        self.relays.watch(&mut self.links, &self.options.bpffs_root);
    }

    /// How many uplinks have XDP, and how many were to have it and are left to tc.
    pub fn relays(&self) -> [usize; 2] {
        self.relays.count()
    }

    /// Attaches the socket hooks, or renews them. Says how many programs were not there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach_sockets(&mut self) -> Result<usize> {
        sockets::attach(&mut self.ebpf, &mut self.links, &self.options)
    }

    /// Detaches what this agent or an earlier one has left on links that are none of `ours`, and all that an earlier one
    /// attached in another way than this one does. Where this one's programs could not take the place of an earlier
    /// one's, those stay.
    pub fn detach_others(&mut self, ours: &HashSet<u32>) {
        self.attached.retain(|ifindex, _| ours.contains(ifindex));
        tc::detach_others(&mut self.links, self.tc, ours);
        let uplinks = self.attached.iter().filter(|(_, role)| **role == Role::Uplink);
        let uplinks = uplinks.map(|(ifindex, _)| *ifindex).collect();
        self.relays.keep_only(&mut self.links, &uplinks);
        if ours.iter().all(|ifindex| self.attached.contains_key(ifindex)) {
            self.tails.remove_others();
        }
    }

    /// How often an outcome was.
    ///
    /// # Errors
    /// If the counters can't be read.
    pub fn count(&self, outcome: Outcome) -> Result<u64> {
        let root = self.maps.parent().context("the maps have a folder")?;
        Ok(read::outcomes(root)?.get(&outcome).copied().unwrap_or_default())
    }

    /// How many records each family's table of live flows holds.
    pub fn max_flows(&self) -> usize {
        self.max_flows
    }

    /// How much is in use of the tables that the planner knows nothing of.
    pub fn usage(&self) -> Vec<Use> {
        self.writer.usage()
    }

    /// A sweep, which removes flows that have ended from the table of live ones.
    pub fn sweep(&mut self) -> Sweep {
        let since = std::mem::replace(&mut self.swept_at, read::now());
        Sweep { maps: self.maps.clone(), counted: self.writer.counted(), since }
    }

    /// Backends that serve no more, whose sockets are to be ended; `None` if there are none.
    pub fn abandoned(&self, ops: &[Op]) -> Option<Abandoned> {
        let backends = ops.iter().filter_map(|op| match op {
            Op::Backend { backend, .. } if !backend.serving => {
                Some((backend.address, backend.service))
            }
            _ => None,
        });
        let backends: HashSet<(SocketAddr, u32)> = backends.collect();
        (!backends.is_empty()).then(|| Abandoned { maps: self.maps.clone(), backends })
    }

    /// Notes which connections were caught behind the kernel's NAT since the last call.
    ///
    /// # Errors
    /// If the maps can't be used, or the kernel's table of connections can't.
    pub fn note_caught(&mut self) -> Result<()> {
        let Some(caught) = self.wishes.take_caught() else { return Ok(()) };
        let noted = caught.run()?;
        tracing::debug!("{noted} connections of pods are the second line's");
        Ok(())
    }

    /// Short cuts that were asked for since the last call, to be looked at; `None` if there are none.
    pub fn wishes(&mut self) -> Option<Granting> {
        self.wishes.take()
    }

    /// Keeps in mind who got a short cut: it is looked at once more.
    pub fn keep_granted(&mut self, granted: Keys) {
        self.wishes.keep(granted);
    }

    /// Which backends got no source port for how many flows since they were asked for last, by the numbers of
    /// their Service ports.
    pub fn take_exhausted(&mut self) -> BTreeMap<(u32, SocketAddr), u64> {
        self.writer.take_exhausted()
    }
}

/// The planner for what the maps hold, from which goes what makes no sense.
fn recover(writer: &mut Writer) -> Result<Planner> {
    let (planner, repairs) = Planner::recover(writer.capacity(), &writer.take_over()?);
    repairs.iter().try_for_each(|op| writer.apply(op))?;
    Ok(planner)
}

/// Refuses a second agent with the same pins.
fn lock(root: &Path) -> Result<Flock<OwnedFd>> {
    let directory =
        fs::File::open(root).with_context(|| format!("cannot open {}", root.display()))?;
    Flock::lock(OwnedFd::from(directory), FlockArg::LockExclusiveNonblock).map_err(|_| {
        anyhow::anyhow!(
            "another portal is running with the pins under {}. Stop it first, or give this one \
             a --bpffs-root of its own",
            root.display()
        )
    })
}

/// Removes the datapath: programs, links, maps, folders. clsact qdiscs stay, which others may use.
///
/// # Errors
/// All of what could not be removed, in one error.
pub fn cleanup(bpffs_root: &Path) -> Result<()> {
    if !bpffs_root.exists() {
        return Ok(());
    }
    let _lock = lock(bpffs_root)?;
    for handle in [tc::handle_of(bpffs_root)?, tc::OLD_HANDLE] {
        tc::remove_filters(handle, |_| false);
    }
    let mut problems = Vec::new();
    for folder in [links_folder(bpffs_root), maps_folder(bpffs_root)] {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.filter_map(Result::ok) {
            if let Err(error) = fs::remove_file(entry.path()) {
                problems.push(format!("{}: {error}", entry.path().display()));
            }
        }
        if let Err(error) = fs::remove_dir(&folder) {
            problems.push(format!("{}: {error}", folder.display()));
        }
    }
    if let Err(error) = fs::remove_dir(bpffs_root) {
        // The root of a bpffs of its own can't be removed, and need not be.
        if error.raw_os_error() != Some(libc::EBUSY) {
            problems.push(format!("{}: {error}", bpffs_root.display()));
        }
    }
    anyhow::ensure!(problems.is_empty(), "could not be removed:\n  {}", problems.join("\n  "));
    Ok(())
}
