//! Loads the programs, on the maps that are pinned or on fresh ones.

use std::fs;
use std::num::NonZero;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData, MapInfo};
use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use ipnet::IpNet;
use proxy_common::abi::ABI;
use proxy_common::settings::{Guard, PORT_STRIDE, Range4, Range6, Settings, per_tick, seconds};
use proxy_common::tables::Config;

use super::clock;
use super::contract::shapes;
use super::probe::{self, OwnNamespace};
use super::{Options, Sizes, SocketLb, conntrack, read, tails, tc, xdp};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/portal-ebpf.o"));

/// "Info", as aya-log numbers it.
const LEVEL_INFO: u8 = 3;

/// How many lines of a verifier's log are shown.
const LOG_LINES: usize = 20;

/// Whether this binary carries an eBPF object.
pub fn has_object() -> bool {
    !OBJECT.is_empty()
}

/// Loads all programs. `maps` is the folder of the pinned maps.
pub fn load(options: &Options, maps: &Path) -> Result<Ebpf> {
    ensure!(
        has_object(),
        "this portal was built without its eBPF object. Build it with `cargo xtask build`, which \
         sees to the eBPF toolchain"
    );
    let before = check_pinned(maps)?;
    let [fresh_seed, key @ ..] = secrets::<5>()?;
    let seed = before.map_or(fresh_seed, |config| config.seed);
    let takeover_until = before.map_or_else(|| takeover_until(options), |c| c.takeover_until);
    let guard = Guard { limit: per_tick(options.syn_guard), key };
    let settings = Settings { guard, ..settings(options, seed, takeover_until) };
    let paths: Vec<_> = shapes().map(|shape| (shape.name, maps.join(shape.name))).collect();
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTINGS", &settings, true);
    // At zero the verifier removes all that logs.
    let log_level = if options.trace { LEVEL_INFO } else { 0 };
    loader.override_global("AYA_LOG_LEVEL", &log_level, true);
    let mut other_sizes = Vec::new();
    for (name, path) in &paths {
        loader.map_pin_path(name, path);
        let asked = size_of(name, options);
        let size = match MapInfo::from_pin(path) {
            Ok(info) => Some(info.max_entries()),
            Err(_) => asked,
        };
        if asked.is_some() && size != asked {
            other_sizes.push(*name);
        }
        if let Some(size) = size {
            loader.map_max_entries(name, size);
        }
    }
    if !other_sizes.is_empty() {
        tracing::warn!(
            "the maps that are there keep their sizes, which are others than asked for ({}); after `portal \
             cleanup`, which ends all connections through Services, they are made anew",
            other_sizes.join(", ")
        );
    }
    let mut ebpf = loader.load(OBJECT).map_err(|error| refused(error, options))?;
    let config = Config { abi: ABI, seed, lifetimes: settings.lifetimes, takeover_until };
    let map = ebpf.map_mut("config").context("the object has no map config")?;
    Array::try_from(map)?.set(0, config, 0).context("cannot write map config")?;
    let is_for_few = |name: &str| {
        tails::is_of_tunnels(name) || tc::is_for_neighbours(name) || xdp::is_relay(name)
    };
    load_programs(ebpf.programs_mut().filter(|(name, _)| !is_for_few(name)))?;
    Ok(ebpf)
}

/// Has the kernel take programs, on some processors at once: to verify them is most of what a start takes.
fn load_programs<'a>(
    programs: impl Iterator<Item = (&'a str, &'a mut Program)> + Send,
) -> Result<()> {
    const MOST: usize = 4;
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MOST);
    let queue = Mutex::new(programs);
    let load_some = || {
        let next = || queue.lock().expect("no panic while locked").next();
        while let Some((name, program)) = next() {
            load_program(program).map_err(shortened).with_context(|| format!("program {name}"))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(load_some)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic while loading"))
    })
}

fn load_program(program: &mut Program) -> Result<(), aya::programs::ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        // The object has no others.
        _ => Ok(()),
    }
}

/// Until when connections that nobody here knows may be another proxy's. There is none to be taken over from where the
/// kernel follows no connections.
fn takeover_until(options: &Options) -> u32 {
    if !conntrack::is_in_use() || options.takeover_grace == 0 {
        return 0;
    }
    tracing::info!(
        "first start beside connections that the kernel follows: for {} s those to VIPs that are under way are left \
         to it",
        seconds(options.takeover_grace)
    );
    read::now() + options.takeover_grace
}

/// Compares the pinned maps with the contract: aya would take a map of any shape. Returns what they were used
/// with, or nothing if there are none.
fn check_pinned(maps: &Path) -> Result<Option<Config>> {
    for shape in shapes() {
        let path = maps.join(shape.name);
        let Ok(info) = MapInfo::from_pin(&path) else { continue };
        let actual = (info.key_size() as usize, info.value_size() as usize);
        if actual != (shape.key, shape.value) {
            bail!(other_contract(&path, "another layout"));
        }
    }
    let path = maps.join("config");
    if !path.exists() {
        return Ok(None);
    }
    let map = Map::Array(MapData::from_pin(&path)?);
    let config: Config = Array::<_, Config>::try_from(map)?.get(&0, 0)?;
    match config.abi {
        // Made, but not yet filled in when its agent was killed.
        0 => Ok(None),
        ABI => Ok(Some(config)),
        other => bail!(other_contract(&path, &format!("contract {other}, not {ABI}"))),
    }
}

fn other_contract(path: &Path, what: &str) -> String {
    format!(
        "{} was made by another version of portal ({what}). Remove what it left with \
         `portal cleanup` and start again; connections through Services are then set up anew",
        path.display()
    )
}

/// Why the kernel does not take the object: for want of memory, or because it is too old.
fn refused(error: aya::EbpfError, options: &Options) -> anyhow::Error {
    let is_enomem = |cause: &(dyn std::error::Error + 'static)| {
        let error = cause.downcast_ref::<std::io::Error>();
        error.is_some_and(|error| error.raw_os_error() == Some(libc::ENOMEM))
    };
    let causes =
        std::iter::successors(Some(&error as &(dyn std::error::Error + 'static)), |cause| {
            cause.source()
        });
    let has_no_memory = causes.into_iter().any(is_enomem);
    let error = shortened(error);
    if has_no_memory {
        let needed = options.sizes.megabytes();
        return error.context(format!(
            "there is not enough memory for the maps, which take about {needed} MB and count for this \
             process's memory limit: raise the limit above {} MB, or take less: --table-size=small, \
             --max-flows, --max-embryos",
            needed + 64
        ));
    }
    error.context(
        "the kernel does not take Portal's eBPF object (it needs Linux 5.10 or later with BTF)",
    )
}

/// How many elements a map gets that is made anew, if it is not what the object says. LRU tables grow
/// with the number of CPUs, each of which keeps some of their elements for itself.
fn size_of(name: &str, options: &Options) -> Option<u32> {
    const PER_CPU: u32 = 1024;
    let cpus = possible_cpus();
    let Sizes { tables, flows, embryos, others } = options.sizes;
    let table = name.rsplit_once("_v").map_or(name, |(table, _)| table);
    match table {
        "services" | "names" | "turns" | "traffic" => Some(tables.services),
        // Two in each element.
        "slots" => Some(tables.slots / 2),
        "backends" | "loads" => Some(tables.backends),
        "ranges" => Some(tables.ranges),
        "flows" => Some(flows),
        "embryos" => Some(embryos.max(cpus * PER_CPU)),
        "verified" => Some((others / 4).max(cpus * PER_CPU)),
        "fragments" => Some((others / 8).max(cpus * PER_CPU)),
        "peers" | "affinity" => Some(others.max(cpus * PER_CPU)),
        _ => None,
    }
}

fn possible_cpus() -> u32 {
    aya::util::nr_cpus().ok().and_then(|count| u32::try_from(count).ok()).unwrap_or(1)
}

/// Words that clients can't guess: by the seed they would choose their backend, by the guard's key they would pass for others.
fn secrets<const N: usize>() -> Result<[u32; N]> {
    let mut words = [0; N];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| {
            std::io::Read::read_exact(&mut file, bytemuck::cast_slice_mut(&mut words))
        })
        .context("cannot read random numbers from /dev/urandom")?;
    Ok(words)
}

fn settings(options: &Options, seed: u32, takeover_until: u32) -> Settings {
    let (netns, cookie) = match probe::own_namespace() {
        OwnNamespace::Cookie(cookie) => (Settings::BY_COOKIE, cookie),
        OwnNamespace::Initial => (Settings::INITIAL, 0),
        OwnNamespace::Unknown(error) => {
            if options.socket_lb == SocketLb::Host {
                tracing::warn!(
                    "this kernel does not name network namespaces ({error}; 5.14 does), and this one is \
                     not the machine's first: the sockets of all of them are translated, as with \
                     --socket-lb=all"
                );
            }
            (Settings::UNKNOWN, 0)
        }
    };
    let all_sockets = options.socket_lb == SocketLb::All || netns == Settings::UNKNOWN;
    let (first, last) = options.masquerade_ports;
    let ports = u32::from(last) - u32::from(first) + 1;
    Settings {
        first_port: first.into(),
        port_count: if ports.is_multiple_of(PORT_STRIDE) { ports - 1 } else { ports },
        lifetimes: options.lifetimes,
        seed,
        clock: clock::clock(),
        socket_errno: probe::socket_errno().into(),
        ipv6_sums: probe::ipv6_sums().into(),
        netns,
        netns_cookie: bytemuck::cast(cookie),
        all_sockets: all_sockets.into(),
        cpus: possible_cpus(),
        vip_ping: options.vip_ping.into(),
        takeover_until,
        masquerade_all: options.masquerade_all.into(),
        masquerade_pods: options.masquerade_pods.into(),
        short_cut: options.short_cut.into(),
        catch_all: options.catch_all,
        guard: Settings::DEFAULT.guard,
        pods4: options.cluster_cidrs.iter().find_map(range4).unwrap_or(Settings::DEFAULT.pods4),
        pods6: options.cluster_cidrs.iter().find_map(range6).unwrap_or(Settings::DEFAULT.pods6),
    }
}

fn range4(range: &IpNet) -> Option<Range4> {
    let IpNet::V4(range) = range else { return None };
    Some(Range4 { address: range.network().octets(), mask: range.netmask().octets() })
}

fn range6(range: &IpNet) -> Option<Range6> {
    let IpNet::V6(range) = range else { return None };
    Some(Range6 { address: range.network().octets(), mask: range.netmask().octets() })
}

/// A verifier's error holds its whole log: its end says what is wrong.
pub(super) fn shortened(error: impl std::error::Error) -> anyhow::Error {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    let lines: Vec<&str> = text.lines().collect();
    let end = lines.len().saturating_sub(LOG_LINES);
    anyhow::anyhow!("{}", lines[end..].join("\n"))
}
