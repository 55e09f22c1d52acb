//! Reads the pinned maps: for an agent that takes over, and for listings, which need no agent.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};
use aya::maps::{Map, MapData, PerCpuArray};
use ipnet::IpNet;
use proxy_common::tables::{
    Backend, FlowKey, FlowValue, Name, RangeData, ServiceKey, ServiceValue,
};
use proxy_common::{Addr4, Addr6, Family, Outcome, V4, V6, proto};

use super::sys::for_each;
use super::writer::{FamilyTables, Writer};
use super::{maps_folder, name_of};
use crate::desired::{Frontend, PortId};
use crate::model::{IpFamily, ObjectName, Protocol};
use crate::plan::{Actual, ActualBackend, ActualService, BackendEntry, Lead};

/// An address of one family from an address of any.
pub trait FromIp: Sized {
    /// `None` if it is of the other family.
    fn from_ip(address: IpAddr) -> Option<Self>;
}

impl FromIp for Addr4 {
    fn from_ip(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(address) => Some(address.into()),
            IpAddr::V6(_) => None,
        }
    }
}

impl FromIp for Addr6 {
    fn from_ip(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address.into()),
        }
    }
}

/// What the tables hold.
pub(super) fn read_actual(writer: &Writer) -> Result<Actual> {
    let mut actual = Actual::default();
    for entry in &writer.names {
        let (id, name) = entry.context("cannot read the map names")?;
        if let Some(port) = port_id(&name) {
            actual.names.insert(id, port);
        }
    }
    read_family(&writer.v4, IpFamily::V4, &mut actual)?;
    read_family(&writer.v6, IpFamily::V6, &mut actual)?;
    for service in &actual.services {
        let Lead { cluster, local, .. } = service.lead;
        let end = cluster.first.saturating_add(cluster.count).saturating_add(local.count);
        for slot in cluster.first..end.min(writer.slots.length()) {
            let number = u32::try_from(writer.slots.get(slot)).unwrap_or(u32::MAX);
            actual.slots.insert(slot, number);
        }
    }
    Ok(actual)
}

fn read_family<F: Family>(
    tables: &FamilyTables<F>,
    family: IpFamily,
    actual: &mut Actual,
) -> Result<()> {
    for entry in &tables.services {
        let (key, value) = entry.context("cannot read the Services")?;
        match frontend(&key) {
            Some(frontend) => {
                actual.services.push(ActualService { frontend, lead: lead(&value) });
            }
            None => actual.marks.push((key.vip.into(), value.flags)),
        }
    }
    for key in tables.ranges.keys() {
        let key = key.context("cannot read the source ranges")?;
        let (prefix, data) = (key.prefix_len(), key.data());
        let bits = u8::try_from(prefix.saturating_sub(RangeData::<F>::SERVICE_BITS));
        let address: IpAddr = data.address.into();
        if let Ok(range) = bits.map(|bits| IpNet::new(address, bits)) {
            let range = range.context("a source range is longer than an address")?;
            actual.ranges.push((u32::from_be_bytes(data.service), range));
        }
    }
    for number in 0..tables.backends.length() {
        let backend = tables.backends.get(number);
        if backend.generation != 0 {
            let entry = entry_of(&backend);
            actual.backends.push(ActualBackend { family, number, entry });
        }
    }
    Ok(())
}

fn lead(value: &ServiceValue) -> Lead {
    let ServiceValue { id, cluster, local, affinity, flags, .. } = *value;
    Lead { id, cluster, local, affinity, flags }
}

fn entry_of<F: Family>(backend: &Backend<F>) -> BackendEntry {
    BackendEntry {
        address: SocketAddr::new(backend.addr.into(), backend.port.number()),
        generation: backend.generation,
        serving: backend.flags & Backend::<F>::SERVING != 0,
        local: backend.flags & Backend::<F>::LOCAL != 0,
        usable: backend.flags & Backend::<F>::IN_CLUSTER != 0,
        usable_local: backend.flags & Backend::<F>::IN_LOCAL != 0,
        weight: backend.weight,
        service: backend.service,
    }
}

/// The frontend of a key; `None` if it marks a VIP.
fn frontend<F: Family>(key: &ServiceKey<F>) -> Option<Frontend> {
    let protocol = Protocol::from_number(key.proto)?;
    Some(Frontend { vip: key.vip.into(), port: key.port.number(), protocol })
}

/// The Service port of a name. The family is not known from it.
fn port_id(name: &Name) -> Option<PortId> {
    Some(PortId {
        service: ObjectName::new(text(&name.namespace), text(&name.service)),
        port: text(&name.port).to_owned(),
        protocol: Protocol::from_number(name.proto)?,
        family: IpFamily::V4,
    })
}

fn text(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).unwrap_or_default()
}

/// What the pinned maps under `bpffs_root` hold of Services.
///
/// # Errors
/// If there are no such maps; says how to come by them.
pub fn services(bpffs_root: &Path) -> Result<Actual> {
    Writer::open(&maps_folder(bpffs_root)).with_context(|| no_maps(bpffs_root))?.actual()
}

fn no_maps(bpffs_root: &Path) -> String {
    format!(
        "no Portal datapath is installed under {} (start one with `portal run`, or name its place \
         with --bpffs-root)",
        bpffs_root.display()
    )
}

/// A flow, from its client's record.
#[derive(Clone, Debug)]
pub struct Flow {
    /// The protocol's number.
    pub proto: u8,
    /// Who opened it.
    pub client: SocketAddr,
    /// Where it was sent to.
    pub frontend: SocketAddr,
    /// Where it goes.
    pub backend: SocketAddr,
    /// The client as the backend sees it.
    pub seen_as: SocketAddr,
    /// The name of its state.
    pub state: &'static str,
    /// Ticks until it ends, if nothing more comes in this direction.
    pub expires: u32,
    /// The Service port's number.
    pub service: u32,
}

/// All flows in the pinned maps under `bpffs_root`, embryos included.
///
/// # Errors
/// If there are no such maps; says how to come by them.
pub fn flows(bpffs_root: &Path) -> Result<Vec<Flow>> {
    let mut flows = Vec::new();
    let now = now();
    for table in ["flows", "embryos"] {
        read_flows::<V4>(bpffs_root, table, now, &mut flows)?;
        read_flows::<V6>(bpffs_root, table, now, &mut flows)?;
    }
    Ok(flows)
}

fn read_flows<F: Family>(
    bpffs_root: &Path,
    table: &str,
    now: u32,
    flows: &mut Vec<Flow>,
) -> Result<()> {
    let path = maps_folder(bpffs_root).join(name_of::<F>(table));
    let map = MapData::from_pin(&path).with_context(|| no_maps(bpffs_root))?;
    for_each(map.fd(), |key: &FlowKey<F>, value: &FlowValue<F>| {
        if value.flags & FlowValue::<F>::IS_REPLY == 0 {
            flows.push(flow(key, value, now));
        }
    })
    .with_context(|| format!("cannot read {}", path.display()))
}

fn flow<F: Family>(key: &FlowKey<F>, value: &FlowValue<F>, now: u32) -> Flow {
    let address =
        |address: F::Addr, port: proxy_common::Port| SocketAddr::new(address.into(), port.number());
    let other = &value.other;
    Flow {
        proto: key.proto,
        client: address(key.src, key.sport),
        frontend: address(key.dst, key.dport),
        backend: address(other.src, other.sport),
        seen_as: address(other.dst, other.dport),
        state: proxy_common::tables::State::label(value.state),
        expires: value.seen.wrapping_add(value.timeout).saturating_sub(now),
        service: value.service,
    }
}

/// Now, in the ticks of flow records.
#[expect(clippy::cast_possible_truncation, reason = "ticks are 32 bits, as in the datapath")]
pub fn now() -> u32 {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC.now().expect("every kernel has this clock");
    let nanoseconds = std::time::Duration::from(clock).as_nanos();
    (nanoseconds >> proxy_common::settings::TICK_SHIFT) as u32
}

/// How often each outcome was, over all CPUs.
///
/// # Errors
/// If there are no pinned maps under `bpffs_root`.
pub fn outcomes(bpffs_root: &Path) -> Result<BTreeMap<Outcome, u64>> {
    let path = maps_folder(bpffs_root).join("outcomes");
    let map = MapData::from_pin(&path).with_context(|| no_maps(bpffs_root))?;
    let counts = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(map))?;
    let sum = |outcome: &Outcome| -> Result<(Outcome, u64)> {
        let values = counts.get(&outcome.index(), 0).context("cannot read the map outcomes")?;
        Ok((*outcome, values.iter().sum()))
    };
    Outcome::ALL.iter().map(sum).collect()
}

/// The names of Service ports by number, for listings.
pub fn names(actual: &Actual) -> HashMap<u32, String> {
    let name = |port: &PortId| match port.port.as_str() {
        "" => port.service.to_string(),
        name => format!("{}:{name}", port.service),
    };
    actual.names.iter().map(|(id, port)| (*id, name(port))).collect()
}

/// The name of a protocol number, for listings.
pub fn protocol(number: u8) -> &'static str {
    proto::name(number)
}
