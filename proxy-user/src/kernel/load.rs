//! Loads the programs, on the maps that are pinned or on fresh ones.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData, MapInfo};
use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use ipnet::IpNet;
use proxy_common::abi::ABI;
use proxy_common::settings::{Range4, Range6, Settings};
use proxy_common::tables::Config;

use super::contract::shapes;
use super::{Options, SocketLb, probe, tc};

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
    let seed = check_pinned(maps)?.unwrap_or_else(fresh_seed);
    let settings = settings(options, seed);
    let paths: Vec<_> = shapes().map(|shape| (shape.name, maps.join(shape.name))).collect();
    let mut loader = EbpfLoader::new();
    loader.override_global("SETTINGS", &settings, true);
    // At zero the verifier removes all that logs.
    let log_level = if options.trace { LEVEL_INFO } else { 0 };
    loader.override_global("AYA_LOG_LEVEL", &log_level, true);
    for (name, path) in &paths {
        loader.map_pin_path(name, path);
        let size = match MapInfo::from_pin(path) {
            Ok(info) => Some(info.max_entries()),
            Err(_) => name.starts_with("flows_").then_some(options.max_flows),
        };
        if let Some(size) = size {
            loader.map_max_entries(name, size);
        }
    }
    let mut ebpf = loader.load(OBJECT).map_err(shortened).context(
        "the kernel does not take Portal's eBPF object (it needs Linux 5.10 or later with BTF)",
    )?;
    write_config(&mut ebpf, seed)?;
    for (name, program) in ebpf.programs_mut().filter(|(name, _)| !tc::is_loaded_late(name)) {
        load_program(program).map_err(shortened).with_context(|| format!("program {name}"))?;
    }
    Ok(ebpf)
}

fn load_program(program: &mut Program) -> Result<(), aya::programs::ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        // The object has no others.
        _ => Ok(()),
    }
}

/// Compares the pinned maps with the contract: aya would take a map of any shape. Returns the seed
/// that they were used with, or nothing if there are none.
fn check_pinned(maps: &Path) -> Result<Option<u32>> {
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
        ABI => Ok(Some(config.seed)),
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

fn write_config(ebpf: &mut Ebpf, seed: u32) -> Result<()> {
    let map = ebpf.map_mut("config").context("the object has no map config")?;
    Array::try_from(map)?.set(0, Config { abi: ABI, seed }, 0).context("cannot write map config")
}

/// A seed that clients can't guess, so that they can't choose their backend.
fn fresh_seed() -> u32 {
    let mut bytes = [0; 4];
    match fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes))
    {
        Ok(()) => u32::from_ne_bytes(bytes),
        Err(_) => std::process::id(),
    }
}

fn settings(options: &Options, seed: u32) -> Settings {
    let cookie = probe::netns_cookie();
    if let (SocketLb::Host, Err(error)) = (options.socket_lb, &cookie) {
        tracing::warn!(
            "this kernel does not name network namespaces ({error}; 5.14 does): the sockets of all of \
             them are translated, as with --socket-lb=all"
        );
    }
    let all_sockets = options.socket_lb == SocketLb::All || cookie.is_err();
    let (first_port, port_count) = masquerade_ports(probe::ephemeral_ports());
    Settings {
        first_port,
        port_count,
        seed,
        coarse_clock: probe::coarse_clock().into(),
        socket_errno: probe::socket_errno().into(),
        netns_cookie: bytemuck::cast(cookie.unwrap_or_default()),
        all_sockets: all_sockets.into(),
        vip_ping: options.vip_ping.into(),
        local_by_cidr: options.local_by_cidr.into(),
        masquerade_all: options.masquerade_all.into(),
        masquerade_pods: options.masquerade_pods.into(),
        pods4: options.cluster_cidrs.iter().find_map(range4).unwrap_or(Settings::DEFAULT.pods4),
        pods6: options.cluster_cidrs.iter().find_map(range6).unwrap_or(Settings::DEFAULT.pods6),
        ..Settings::DEFAULT
    }
}

/// First and number of the source ports that masqueraded flows get: above the host's ephemeral ports,
/// or else below them and the `NodePorts`. Sockets of the host's own must not have the same.
fn masquerade_ports((low, high): (u16, u16)) -> (u32, u32) {
    const FEWEST: u32 = 1024;
    const LAST: u32 = 65_534;
    const NODE_PORTS: u32 = 30_000;
    let Settings { first_port, .. } = Settings::DEFAULT;
    let above = first_port.max(u32::from(high) + 1);
    if above + FEWEST <= LAST {
        return (above, LAST - above + 1);
    }
    let end = u32::from(low).min(NODE_PORTS);
    if end >= 2 * FEWEST {
        let first = end.saturating_sub(8 * FEWEST).max(FEWEST);
        return (first, end - first);
    }
    tracing::warn!(
        "ip_local_port_range leaves no ports for masqueraded flows: {first_port} and above are used, \
         which may meet the host's own. Keep its end below {first_port}"
    );
    (first_port, LAST - first_port + 1)
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

#[cfg(test)]
mod tests {
    use super::masquerade_ports;

    #[test]
    fn masqueraded_flows_keep_out_of_the_hosts_ephemeral_ports() {
        assert_eq!(masquerade_ports((32_768, 60_999)), (61_000, 4_535));
        assert_eq!(masquerade_ports((32_768, 62_999)), (63_000, 2_535));
        assert_eq!(masquerade_ports((32_768, 65_535)), (21_808, 8_192));
        assert_eq!(masquerade_ports((4_000, 65_535)), (1_024, 2_976));
        assert_eq!(masquerade_ports((1_024, 65_535)), (61_000, 4_535));
    }
}
