//! Reads the pinned maps: for an agent that takes over, and for listings, which need no agent.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};
use aya::maps::{Array, Map, MapData, PerCpuArray};
use ipnet::IpNet;
use proxy_common::tables::{
    Backend, Choice, Config, EmbryoValue, Facts, FlowKey, FlowValue, Name, Origin, Range,
    RangeData, ServiceKey, ServiceValue, State,
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
    actual.slots = read_slots(writer, &actual.services)?;
    Ok(actual)
}

/// What is in the slots, up to the last one that a frontend leads to.
fn read_slots(writer: &Writer, services: &[ActualService]) -> Result<Vec<u32>> {
    let choices = || services.iter().flat_map(|service| [service.lead.cluster, service.lead.local]);
    // Tables first, which say how many members there are.
    let tables = choices().filter(|choice| choice.table != Range::NO_TABLE);
    let end = tables.map(|choice| choice.table.saturating_add(choice.count)).max();
    let mut slots = slots_to(writer, end.unwrap_or_default())?;
    let members = |choice: Choice| {
        let first = choice.table as usize;
        let table = slots.get(first..first.saturating_add(choice.count as usize));
        let most = table.into_iter().flatten().max();
        if choice.table == Range::NO_TABLE {
            choice.count
        } else {
            most.map_or(0, |position| position.saturating_add(1))
        }
    };
    let end = choices().map(|choice| choice.members.saturating_add(members(choice))).max();
    let end = end.unwrap_or_default() as usize;
    if end > slots.len() {
        slots = slots_to(writer, u32::try_from(end)?)?;
    }
    Ok(slots)
}

fn slots_to(writer: &Writer, end: u32) -> Result<Vec<u32>> {
    let mut slots = Vec::new();
    let each = |_, pair: [u32; 2]| slots.extend(pair);
    writer.slots.read_to(end.div_ceil(2), each).context("cannot read the slots")?;
    Ok(slots)
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
    let each = |number, backend: Backend<F>| {
        if backend.generation != 0 {
            actual.backends.push(ActualBackend { family, number, entry: entry_of(&backend) });
        }
    };
    tables.backends.read_to(u32::MAX, each).context("cannot read the backends")
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
        counted: backend.flags & Backend::<F>::COUNTED != 0,
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
    /// Whether it leads to a Service's backend.
    pub has_backend: bool,
    /// The Service port's number; 0 if it has none, or its backend is gone.
    pub service: u32,
}

/// All flows in the pinned maps under `bpffs_root`, live or not.
///
/// # Errors
/// If there are no such maps; says how to come by them.
pub fn flows(bpffs_root: &Path) -> Result<Vec<Flow>> {
    let mut flows = Vec::new();
    read_flows::<V4>(bpffs_root, &mut flows)?;
    read_flows::<V6>(bpffs_root, &mut flows)?;
    Ok(joined(flows))
}

/// A Service's flow that is masqueraded where it leaves is one, with the source that its backend sees.
fn joined(flows: Vec<Flow>) -> Vec<Flow> {
    let (outer, masqueraded): (Vec<Flow>, Vec<Flow>) =
        flows.into_iter().partition(|flow| flow.has_backend);
    let mut sources: HashMap<(u8, SocketAddr, SocketAddr), Flow> = masqueraded
        .into_iter()
        .map(|flow| ((flow.proto, flow.client, flow.backend), flow))
        .collect();
    let seen_as = |mut flow: Flow| {
        if let Some(source) = sources.remove(&(flow.proto, flow.seen_as, flow.backend)) {
            flow.seen_as = source.seen_as;
        }
        flow
    };
    let mut joined: Vec<Flow> = outer.into_iter().map(seen_as).collect();
    joined.extend(sources.into_values());
    joined
}

/// What the agent told the programs that use the maps of a folder.
pub(super) fn config(maps: &Path) -> Result<Config> {
    let map = Map::Array(MapData::from_pin(maps.join("config"))?);
    Ok(Array::<_, Config>::try_from(map)?.get(&0, 0)?)
}

fn read_flows<F: Family>(bpffs_root: &Path, flows: &mut Vec<Flow>) -> Result<()> {
    let maps = maps_folder(bpffs_root);
    let lifetimes = config(&maps).with_context(|| no_maps(bpffs_root))?.lifetimes;
    let backends = super::writer::open_mapped::<Backend<F>>(&maps, &name_of::<F>("backends"))?;
    let now = now();
    let service = |origin: Origin| {
        let is_there = origin.backend < backends.length();
        let row = is_there.then(|| backends.get(origin.backend).ok()).flatten();
        row.filter(|row| row.generation == origin.generation).map_or(0, |row| row.service)
    };
    let mut list = |key: &FlowKey<F>, other: &FlowKey<F>, facts: Facts| {
        if !facts.origin.is(Origin::REPLY) && !facts.is_in(State::Foreign) {
            let lifetime = *lifetimes.of(key.proto, facts.state);
            let expires = facts.seen.wrapping_add(lifetime).saturating_sub(now);
            let service = service(facts.origin);
            flows.push(Flow { expires, service, ..flow(key, other, facts) });
        }
    };
    let mut live: HashSet<Vec<u8>> = HashSet::new();
    let for_table = |table: &str| {
        let path = maps.join(name_of::<F>(table));
        let map = MapData::from_pin(&path).with_context(|| no_maps(bpffs_root))?;
        Ok::<_, anyhow::Error>((path, map))
    };
    let (path, map) = for_table("flows")?;
    for_each(map.fd(), |key: &FlowKey<F>, value: &FlowValue<F>| {
        live.insert(bytemuck::bytes_of(key).to_vec());
        list(key, &value.other_by_stack(key), value.facts());
    })
    .with_context(|| format!("cannot read {}", path.display()))?;
    // What a live flow has left there is its shadow.
    let (path, map) = for_table("embryos")?;
    for_each(map.fd(), |key: &FlowKey<F>, value: &EmbryoValue<F>| {
        if !live.contains(bytemuck::bytes_of(key)) {
            list(key, &value.other, value.facts());
        }
    })
    .with_context(|| format!("cannot read {}", path.display()))
}

fn flow<F: Family>(key: &FlowKey<F>, other: &FlowKey<F>, facts: Facts) -> Flow {
    let address =
        |address: F::Addr, port: proxy_common::Port| SocketAddr::new(address.into(), port.number());
    Flow {
        proto: key.proto,
        client: address(key.src, key.sport),
        frontend: address(key.dst, key.dport),
        backend: address(other.src, other.sport),
        seen_as: address(other.dst, other.dport),
        state: facts.state.label(),
        has_backend: facts.origin.backend != Origin::NO_BACKEND,
        expires: 0,
        service: 0,
    }
}

/// Now, in the ticks of flow records.
#[expect(clippy::cast_possible_truncation, reason = "ticks are 32 bits, as in the datapath")]
pub fn now() -> u32 {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC.now().expect("every kernel has this clock");
    let nanoseconds = std::time::Duration::from(clock).as_nanos();
    (nanoseconds >> proxy_common::settings::TICK_SHIFT) as u32
}

/// How often each outcome was, over all CPUs. What the records of live flows have counted and not yet handed
/// over, at most four seconds' packets of each, is not among it.
///
/// # Errors
/// If there are no pinned maps under `bpffs_root`.
pub fn outcomes(bpffs_root: &Path) -> Result<BTreeMap<Outcome, u64>> {
    let path = maps_folder(bpffs_root).join("outcomes");
    let map = MapData::from_pin(&path).with_context(|| no_maps(bpffs_root))?;
    let counts = PerCpuArray::<_, u64>::try_from(Map::PerCpuArray(map))?;
    let swept = open_swept(&maps_folder(bpffs_root))?;
    let sum = |outcome: &Outcome| -> Result<(Outcome, u64)> {
        let values = counts.get(&outcome.index(), 0).context("cannot read the map outcomes")?;
        let swept = swept.get(&outcome.index(), 0).context("cannot read the map outcomes_swept")?;
        Ok((*outcome, values.iter().sum::<u64>() + swept))
    };
    Outcome::ALL.iter().map(sum).collect()
}

/// What sweeps have added to the outcomes: only they write there.
pub(super) fn open_swept(maps: &Path) -> Result<Array<MapData, u64>> {
    let map = MapData::from_pin(maps.join("outcomes_swept"))?;
    Ok(Array::try_from(Map::Array(map))?)
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
