//! Properties of the planner, over random histories of a small cluster: changes, conflicts, pauses,
//! and agents that are killed between any two writes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use portal::desired::{Access, Backend, Frontend, Patch, Port, PortId, Tables};
use portal::model::{IpFamily, ObjectName, Protocol};
use portal::plan::{
    Actual, ActualBackend, ActualService, BackendEntry, Capacity, Lead, Op, Planner, Refusal,
};
use proptest::prelude::*;
use proxy_common::settings::ticks;
use proxy_common::tables::{Algorithm, Choice, Range, ServiceValue};

const CAPACITY: Capacity = Capacity { services: 200, slots: 8000, backends: 200, ranges: 100 };
const FAMILIES: [IpFamily; 2] = [IpFamily::V4, IpFamily::V6];

/// The kernel's maps, simulated.
#[derive(Clone, Default)]
struct Maps {
    services: BTreeMap<Frontend, Lead>,
    marks: BTreeMap<IpAddr, u32>,
    ranges: BTreeSet<(u32, IpNet)>,
    names: HashMap<u32, PortId>,
    slots: Vec<u32>,
    backends: HashMap<(IpFamily, u32), BackendEntry>,
}

impl Maps {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Backend { family, number, backend } => {
                self.backends.insert((*family, *number), *backend);
            }
            Op::Slots { first, numbers } => {
                let (first, end) = (*first as usize, *first as usize + numbers.len());
                self.slots.resize(self.slots.len().max(end), u32::MAX);
                self.slots[first..end].copy_from_slice(numbers);
            }
            Op::Name { id, port } => {
                self.names.insert(*id, port.clone());
            }
            Op::Unname { id } => {
                self.names.remove(id);
            }
            Op::Lead { frontend, lead } => {
                self.services.insert(*frontend, *lead);
            }
            Op::Remove { frontend } => {
                self.services.remove(frontend).expect("removes what is there");
            }
            Op::Mark { address, flags } => {
                assert_ne!(self.marks.insert(*address, *flags), Some(*flags), "written twice");
            }
            Op::Unmark { address } => {
                self.marks.remove(address).expect("removes what is there");
            }
            Op::Allow { id, range } => assert!(self.ranges.insert((*id, *range))),
            Op::Forbid { id, range } => assert!(self.ranges.remove(&(*id, *range))),
        }
    }

    /// What a restarted agent reads. The maps of names do not know families.
    fn actual(&self) -> Actual {
        let services = self
            .services
            .iter()
            .map(|(frontend, lead)| ActualService { frontend: *frontend, lead: *lead });
        let backends = self.backends.iter().map(|((family, number), entry)| ActualBackend {
            family: *family,
            number: *number,
            entry: *entry,
        });
        let nameless = |port: &PortId| PortId { family: IpFamily::V4, ..port.clone() };
        Actual {
            services: services.collect(),
            marks: self.marks.iter().map(|(ip, flags)| (*ip, *flags)).collect(),
            ranges: self.ranges.iter().copied().collect(),
            names: self.names.iter().map(|(id, port)| (*id, nameless(port))).collect(),
            backends: backends.collect(),
            slots: self.slots.clone(),
        }
    }

    /// The backend's number that is drawn by an index.
    fn number(&self, choice: Choice, index: u32) -> u32 {
        let position = if choice.table == Range::NO_TABLE {
            index
        } else {
            self.slots[(choice.table + index) as usize]
        };
        self.slots[(choice.members + position) as usize]
    }

    /// Where a packet to a frontend may go, anywhere and on this node, and which Service port's it is.
    /// Fails if it leads to a place that makes no sense.
    fn resolve(&self, frontend: &Frontend) -> (PortId, [BTreeSet<SocketAddr>; 2]) {
        let Lead { id, cluster, local, .. } = self.services[frontend];
        let port = self.names.get(&id).expect("a frontend leads to a Service port with a name");
        let addresses = |choice: Choice| {
            let backends = (0..choice.count).map(|index| {
                let number = self.number(choice, index);
                let entry = self.backends[&(IpFamily::of(frontend.vip), number)];
                assert_eq!(entry.service, id, "a slot leads to another Service port's backend");
                entry.address
            });
            backends.collect::<BTreeSet<SocketAddr>>()
        };
        (port.clone(), [addresses(cluster), addresses(local)])
    }

    fn resolved(&self) -> impl Iterator<Item = (PortId, [BTreeSet<SocketAddr>; 2])> {
        self.services.keys().map(|frontend| self.resolve(frontend))
    }

    /// Asserts that the maps hold `wanted` and nothing else.
    fn assert_holds(&self, wanted: &Tables) {
        let winners = winners(wanted);
        let leading: BTreeMap<Frontend, PortId> =
            self.services.keys().map(|f| (*f, self.resolve(f).0)).collect();
        assert_eq!(leading, winners);
        assert_eq!(self.marks, marks(wanted, &winners));
        let ranges = self
            .names
            .iter()
            .flat_map(|(id, port)| wanted[port].source_ranges.iter().map(|range| (*id, *range)));
        assert_eq!(self.ranges, ranges.collect());
        let names: BTreeSet<&PortId> = self.names.values().collect();
        assert_eq!(names, wanted.keys().collect());
        assert_eq!(names.len(), self.names.len(), "a Service port has two numbers");
        for (frontend, port) in &winners {
            assert_eq!(self.resolve(frontend).1, usable(&wanted[port]));
            let lead = self.services[frontend];
            assert_eq!(lead.affinity, ticks(wanted[port].affinity.into()));
            let has = |flag| lead.flags & flag != 0;
            let access = wanted[port].frontends[frontend];
            assert_eq!(has(ServiceValue::REFUSES), access.refuses);
            assert_eq!(has(ServiceValue::LOCAL_FOR_OUTSIDE), access.local_for_outside);
            assert!(wanted[port].algorithm.is_in(lead.flags));
        }
        for (id, port) in &self.names {
            let serving = self.backends.iter().filter(|((family, _), entry)| {
                entry.service == *id && entry.serving && *family == port.family
            });
            let serving: BTreeSet<SocketAddr> = serving.map(|(_, entry)| entry.address).collect();
            let wanted = wanted[port].backends.iter().map(|b| b.address).collect();
            assert_eq!(serving, wanted, "of {port:?}");
        }
    }
}

/// The backends that its slots lead to; this node's only if someone asks for them.
fn usable(port: &Port) -> [BTreeSet<SocketAddr>; 2] {
    let of = |usable: fn(&Backend) -> bool| {
        port.backends.iter().filter(|b| usable(b)).map(|b| b.address).collect()
    };
    let asks = port.frontends.values().any(|access| access.local_for_outside);
    let local = if asks { of(|backend| backend.usable_local) } else { BTreeSet::new() };
    [of(|backend| backend.usable), local]
}

/// The marks of addresses that go with frontends.
fn marks(wanted: &Tables, winners: &BTreeMap<Frontend, PortId>) -> BTreeMap<IpAddr, u32> {
    let mut marks: BTreeMap<IpAddr, u32> = BTreeMap::new();
    for (frontend, port) in winners.iter().filter(|(f, _)| !f.vip.is_unspecified()) {
        let refuses = wanted[port].frontends[frontend].refuses;
        *marks.entry(frontend.vip).or_default() |= if refuses { ServiceValue::REFUSES } else { 0 };
    }
    marks
}

/// Who has each frontend: the oldest, then the first by name.
fn winners(wanted: &Tables) -> BTreeMap<Frontend, PortId> {
    let mut claims: BTreeMap<Frontend, (&str, &PortId)> = BTreeMap::new();
    for (id, port) in wanted {
        for frontend in port.frontends.keys() {
            let claim = (port.created.as_str(), id);
            claims.entry(*frontend).and_modify(|best| *best = claim.min(*best)).or_insert(claim);
        }
    }
    claims.into_iter().map(|(frontend, (_, port))| (frontend, port.clone())).collect()
}

/// The flags of a Service port's frontend, without its algorithm.
fn flags(wanted: &Tables, port: &PortId, frontend: &Frontend) -> Option<u32> {
    let Access { refuses, local_for_outside, .. } = *wanted.get(port)?.frontends.get(frontend)?;
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    let local = flag(local_for_outside, ServiceValue::LOCAL_FOR_OUTSIDE);
    Some(flag(refuses, ServiceValue::REFUSES) | local)
}

/// One step of a history: a new state, what happens before it, and whether the agent is killed.
#[derive(Clone, Debug)]
struct Step {
    wanted: Tables,
    /// Enough for places out of use to be used again.
    pause: bool,
    /// After this share of the writes (of 256) the agent is killed.
    killed_after: Option<u8>,
    restarted: bool,
}

fn port_ids() -> impl Iterator<Item = PortId> {
    (0..3).flat_map(|service| FAMILIES.map(|family| (service, family))).map(|(service, family)| {
        PortId {
            service: ObjectName::new("default", &format!("s{service}")),
            port: "p".to_owned(),
            protocol: Protocol::Tcp,
            family,
        }
    })
}

fn address(family: IpFamily, host: u8) -> IpAddr {
    match family {
        IpFamily::V4 => IpAddr::from([10, 0, 0, host]),
        IpFamily::V6 => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(host)]),
    }
}

fn any_port(family: IpFamily) -> impl Strategy<Value = Port> {
    // Host 0 stands for the unspecified address: a NodePort.
    let frontends =
        proptest::collection::btree_map((0..3_u8, 80..82_u16), any::<(bool, bool)>(), 0..4);
    let backends = proptest::collection::btree_map(10..16_u8, any::<(bool, bool)>(), 0..5);
    let algorithm = proptest::sample::select(Algorithm::ALL.to_vec());
    let ranges = proptest::collection::btree_set(1..4_u8, 0..3);
    (1..4_u8, frontends, backends, ranges, 0..2_u32, algorithm).prop_map(
        move |(created, frontends, backends, ranges, affinity, algorithm)| Port {
            created: created.to_string(),
            frontends: frontends
                .into_iter()
                .map(|((host, port), (refuses, local_for_outside))| {
                    let vip = if host == 0 { any_address(family) } else { address(family, host) };
                    let access = Access { refuses, local_for_outside, ..Access::default() };
                    (Frontend { vip, port, protocol: Protocol::Tcp }, access)
                })
                .collect(),
            backends: backends
                .into_iter()
                .map(|(host, (usable, usable_local))| {
                    let address = SocketAddr::new(address(family, host), 8080);
                    // Whoever is usable here makes the Service usable at all.
                    let usable = usable || usable_local;
                    let (serving, local, weight) = (true, usable_local, 1 + u16::from(host % 3));
                    Backend { address, usable, usable_local, serving, local, weight }
                })
                .collect(),
            source_ranges: ranges.into_iter().map(|h| IpNet::from(address(family, h))).collect(),
            affinity: affinity * 100,
            algorithm,
            ..Port::default()
        },
    )
}

fn any_address(family: IpFamily) -> IpAddr {
    match family {
        IpFamily::V4 => IpAddr::from([0; 4]),
        IpFamily::V6 => IpAddr::from([0_u16; 8]),
    }
}

fn any_tables() -> impl Strategy<Value = Tables> {
    let ports: Vec<_> = port_ids()
        .map(|id| {
            let port = proptest::option::weighted(0.7, any_port(id.family));
            port.prop_map(move |port| port.map(|port| (id.clone(), port)))
        })
        .collect();
    ports.prop_map(|ports| ports.into_iter().flatten().collect())
}

fn any_step() -> impl Strategy<Value = Step> {
    let kill = proptest::option::weighted(0.3, any::<u8>());
    (any_tables(), any::<bool>(), kill, any::<bool>()).prop_map(
        |(wanted, pause, killed_after, restarted)| Step { wanted, pause, killed_after, restarted },
    )
}

/// A step to a state that differs from another in endpoints only.
fn with_other_endpoints(step: &Step, other: &Tables) -> Step {
    let mut step = step.clone();
    for (id, port) in &mut step.wanted {
        if let Some(other) = other.get(id) {
            port.backends.clone_from(&other.backends);
        }
    }
    step
}

/// What has changed of a Service port, if that is endpoints alone.
fn patch(id: &PortId, before: &Port, after: &Port) -> Option<Patch> {
    if (Port { backends: Vec::new(), ..before.clone() })
        != (Port { backends: Vec::new(), ..after.clone() })
    {
        return None;
    }
    let [old, new] = [before, after].map(|port| port.backends.iter().collect::<BTreeSet<_>>());
    let addresses: BTreeSet<IpAddr> =
        old.symmetric_difference(&new).map(|backend| backend.address.ip()).collect();
    let there = after.backends.iter().filter(|b| addresses.contains(&b.address.ip()));
    let backends = there.copied().collect();
    Some(Patch { port: id.clone(), addresses, backends })
}

/// The agent's part of the work, on simulated maps.
struct Agent {
    planner: Planner,
    maps: Maps,
    /// What was wanted last.
    held: Tables,
    /// Plans changes of endpoints as such.
    patches: bool,
    now: Instant,
}

impl Agent {
    fn new() -> Self {
        let (planner, maps) = (Planner::new(CAPACITY), Maps::default());
        Self { planner, maps, held: Tables::new(), patches: true, now: Instant::now() }
    }

    fn restart(&mut self, wanted: &Tables) {
        let (planner, repairs) = Planner::recover(CAPACITY, &self.maps.actual());
        self.planner = planner;
        self.write(&repairs, wanted);
    }

    fn plan(&mut self, wanted: &Tables) -> Vec<Op> {
        let held: Vec<PortId> = self.planner.ports().cloned().collect();
        let gone = held.into_iter().filter(|port| !wanted.contains_key(port));
        let mut changes: Vec<_> = gone.map(|port| (port, None)).collect();
        let mut patches = Vec::new();
        for (id, port) in wanted {
            let before = self.held.get(id).filter(|_| self.planner.criteria(id).is_some());
            match before.and_then(|before| patch(id, before, port)) {
                Some(patch) if self.patches => patches.push(patch),
                _ => changes.push((id.clone(), Some(port.clone()))),
            }
        }
        let mut ops = self.planner.patch(self.now, &patches, &mut Vec::new());
        ops.extend(self.planner.plan(self.now, &changes, &mut Vec::new()));
        ops
    }

    /// Writes, and looks after each write whether every frontend leads to all the backends that its
    /// Service port had or is to have.
    fn write(&mut self, ops: &[Op], wanted: &Tables) {
        let after = winners(wanted);
        let stays: Vec<Frontend> =
            self.maps.services.keys().filter(|f| after.contains_key(f)).copied().collect();
        for op in ops {
            self.maps.apply(op);
            let missing = stays.iter().find(|f| !self.maps.services.contains_key(f));
            assert_eq!(missing, None, "it was and will be, but is not after {op:?}");
            // What a wrong slot does shows after the next write of another kind too.
            if matches!(op, Op::Slots { .. }) {
                continue;
            }
            for (port, backends) in self.maps.resolved() {
                let is = |tables: &Tables| tables.get(&port).is_some_and(|p| usable(p) == backends);
                let whole = is(&self.held) || is(wanted);
                assert!(whole, "{port:?} is half changed after {op:?}");
            }
            for (frontend, lead) in &self.maps.services {
                let port = self.maps.resolve(frontend).0;
                let access = lead.flags % (1 << ServiceValue::ALGORITHM_SHIFT);
                let is = |tables: &Tables| flags(tables, &port, frontend) == Some(access);
                assert!(is(&self.held) || is(wanted), "{frontend:?} has {lead:?} after {op:?}");
                let chooses = |tables: &Tables| {
                    tables.get(&port).is_some_and(|port| port.algorithm.is_in(lead.flags))
                };
                assert!(chooses(&self.held) || chooses(wanted), "{frontend:?} has {lead:?}");
            }
        }
    }

    fn take(&mut self, step: &Step) {
        if step.pause {
            self.now += Duration::from_secs(2);
        }
        if step.restarted {
            self.restart(&step.wanted);
        }
        let mut ops = self.plan(&step.wanted);
        if let Some(share) = step.killed_after {
            ops.truncate(ops.len() * usize::from(share) / 256);
            self.write(&ops, &step.wanted);
            self.restart(&step.wanted);
            ops = self.plan(&step.wanted);
        }
        self.write(&ops, &step.wanted);
        self.maps.assert_holds(&step.wanted);
        assert_eq!(self.plan(&step.wanted), [], "what holds needs no write");
        self.held = step.wanted.clone();
    }

    fn numbers(&self) -> BTreeMap<(PortId, SocketAddr), u32> {
        let named = self.maps.backends.iter().filter(|(_, entry)| entry.serving);
        named
            .filter_map(|((family, number), entry)| {
                let port = self.maps.names.get(&entry.service)?;
                (port.family == *family).then(|| ((port.clone(), entry.address), *number))
            })
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_state_becomes_any_other_and_no_packet_sees_half_of_it(
        steps in proptest::collection::vec(any_step(), 1..6)
    ) {
        let mut agent = Agent::new();
        for step in &steps {
            agent.take(step);
        }
    }

    /// Whether a change of endpoints is planned as such or by a look at all of them, the same comes of it.
    #[test]
    fn changes_of_endpoints_lead_where_whole_plans_lead(
        first in any_step(),
        others in proptest::collection::vec(any_tables(), 1..5),
    ) {
        let mut patching = Agent::new();
        let mut whole = Agent { patches: false, ..Agent::new() };
        let calm = Step { killed_after: None, restarted: false, ..first };
        let steps = others.iter().map(|other| with_other_endpoints(&calm, other));
        for step in [calm.clone()].into_iter().chain(steps) {
            patching.take(&step);
            whole.take(&step);
            let leads = |agent: &Agent| agent.maps.resolved().collect::<Vec<_>>();
            prop_assert_eq!(leads(&patching), leads(&whole));
            prop_assert_eq!(patching.planner.usage(), whole.planner.usage());
        }
    }

    #[test]
    fn what_stays_keeps_its_numbers(first in any_step(), second in any_step()) {
        let mut agent = Agent::new();
        agent.take(&first);
        let (ids, numbers) = (agent.maps.names.clone(), agent.numbers());
        agent.take(&Step { killed_after: None, restarted: false, ..second.clone() });
        for (id, port) in ids.iter().filter(|(_, port)| second.wanted.contains_key(port)) {
            prop_assert_eq!(agent.maps.names.get(id), Some(port));
        }
        let after = agent.numbers();
        for (backend, number) in numbers.iter().filter(|(backend, _)| after.contains_key(backend)) {
            prop_assert_eq!(after[backend], *number);
        }
    }
}

/// A Service port with an address of its own, and backends by their numbers.
fn service(number: u32, backends: impl Iterator<Item = u32>) -> (PortId, Port) {
    let [_, a, b, c] = number.to_be_bytes();
    let id = PortId {
        service: ObjectName::new("default", &format!("s{number}")),
        port: String::new(),
        protocol: Protocol::Tcp,
        family: IpFamily::V4,
    };
    let vip = Frontend { vip: IpAddr::from([96, a, b, c]), port: 80, protocol: Protocol::Tcp };
    let backend = |host: u32| Backend {
        address: SocketAddr::from(((0x0a00_0000 + host).to_be_bytes(), 8080)),
        usable: true,
        usable_local: false,
        serving: true,
        local: false,
        weight: 1,
    };
    let port = Port {
        frontends: [(vip, Access::default())].into(),
        backends: backends.map(backend).collect(),
        ..Port::default()
    };
    (id, port)
}

/// A planner and what it has written, without looks at every write.
struct Large {
    planner: Planner,
    maps: Maps,
    now: Instant,
}

impl Large {
    fn new(capacity: Capacity) -> Self {
        Self { planner: Planner::new(capacity), maps: Maps::default(), now: Instant::now() }
    }

    /// Plans changes, and time passes.
    fn plan(&mut self, changes: &[(PortId, Option<Port>)]) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let ops = self.planner.plan(self.now, changes, &mut refusals);
        ops.iter().for_each(|op| self.maps.apply(op));
        self.now += Duration::from_millis(1100);
        refusals
    }

    /// Where a Service port's slots lead to.
    fn reached(&self, port: &Port) -> BTreeSet<SocketAddr> {
        let vip = port.frontends.keys().next().unwrap();
        self.maps.resolve(vip).1[0].clone()
    }

    fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.planner.is_settled() {
                return;
            }
            self.plan(&[]);
        }
        panic!("tables never come to rest");
    }
}

fn put((id, port): &(PortId, Port)) -> (PortId, Option<Port>) {
    (id.clone(), Some(port.clone()))
}

fn addresses(port: &Port) -> BTreeSet<SocketAddr> {
    port.backends.iter().map(|backend| backend.address).collect()
}

/// So many Service ports of ten endpoints in tables for as many: all are served, then each is rolled over, and
/// after each step no slot leads to an endpoint that is gone.
fn fill_and_roll(capacity: Capacity, count: u32) {
    let mut large = Large::new(capacity);
    let services: Vec<_> = (0..count).map(|n| service(n, 16 * n..16 * n + 10)).collect();
    for some in services.chunks(500) {
        let changes: Vec<_> = some.iter().map(put).collect();
        assert_eq!(large.plan(&changes), []);
    }
    large.settle();
    for (_, port) in &services {
        assert_eq!(large.reached(port), addresses(port));
    }
    let rolled: Vec<_> = (0..count).map(|n| service(n, 16 * n + 3..16 * n + 13)).collect();
    for some in rolled.chunks(500) {
        let changes: Vec<_> = some.iter().map(put).collect();
        assert_eq!(large.plan(&changes), []);
        some.iter().for_each(|(_, port)| assert_eq!(large.reached(port), addresses(port)));
    }
    large.settle();
    // As if the tables had been empty: what stands there has the lengths that they would have got then.
    let mut fresh = Large::new(capacity);
    fresh.plan(&rolled.iter().map(put).collect::<Vec<_>>());
    fresh.settle();
    for (id, port) in &rolled {
        let vip = port.frontends.keys().next().unwrap();
        let choice = |large: &Large| large.maps.services[vip].cluster;
        assert_eq!(choice(&large).count, choice(&fresh).count, "{id:?}");
        assert_eq!(large.reached(port), addresses(port));
    }
}

#[test]
fn the_default_tables_hold_30_000_service_ports_of_10_endpoints_and_their_rollover() {
    fill_and_roll(Capacity::DEFAULT, 30_000);
}

#[test]
fn the_large_tables_hold_100_000_service_ports_of_10_endpoints_and_their_rollover() {
    fill_and_roll(Capacity::LARGE, 100_000);
}

/// F1: "full" refuses what is added, never what is taken away or changed.
#[test]
fn a_full_table_refuses_nothing_but_what_is_added() {
    // Slots for 100 Service ports of ten without tables, and backends for few changes at a time.
    let small = Capacity { services: 300, slots: 1000, backends: 1050, ranges: 10 };
    let mut large = Large::new(small);
    let mut services = Vec::new();
    let more = loop {
        let number = u32::try_from(services.len()).unwrap();
        let one = service(number, 16 * number..16 * number + 10);
        let refusals = large.plan(&[put(&one)]);
        if refusals.is_empty() {
            services.push(one);
        } else {
            let is_of_slots = |r: &Refusal| matches!(r, Refusal::Full { table: "slots", .. });
            assert!(refusals.iter().all(is_of_slots), "{refusals:?}");
            break one;
        }
    };
    assert!(services.len() > 90, "{} Services fit", services.len());
    large.settle();
    // Two of each one's endpoints go, and two others come.
    let count = u32::try_from(services.len()).unwrap();
    let rolled: Vec<_> = (0..count).map(|n| service(n, 16 * n + 2..16 * n + 12)).collect();
    for one in &rolled {
        large.plan(&[put(one)]);
        let (reached, wanted) = (large.reached(&one.1), addresses(&one.1));
        assert!(!reached.is_empty() && reached.is_subset(&wanted), "{reached:?}, not {wanted:?}");
    }
    // Without any endpoints there is nothing to lead to; and with room again all is as it should be.
    for (id, _) in &rolled[..50] {
        large.plan(&[(id.clone(), None)]);
    }
    large.settle();
    for one in rolled[50..].iter().chain([&more]) {
        assert_eq!(large.plan(&[put(one)]), [], "there is room again");
        large.settle();
        assert_eq!(large.reached(&one.1), addresses(&one.1));
    }
}

#[test]
fn service_ports_with_equal_endpoints_share_a_table() {
    let mut large = Large::new(CAPACITY);
    let mut services: Vec<_> = (0..20).map(|n| service(n, 0..10)).collect();
    for (number, (_, port)) in services.iter_mut().enumerate() {
        // Each with a target port of its own.
        for backend in &mut port.backends {
            backend.address.set_port(8000 + u16::try_from(number).unwrap());
        }
    }
    for one in &services {
        assert_eq!(large.plan(&[put(one)]), []);
        assert_eq!(large.reached(&one.1), addresses(&one.1));
    }
    let tables: BTreeSet<u32> =
        large.maps.services.values().map(|lead| lead.cluster.table).collect();
    assert_eq!(tables.len(), 1);
    let slots = large.planner.usage().into_iter().find(|of| of.table == "slots").unwrap();
    assert_eq!(slots.used, 127 + 20 * 10);
    // The last one that has it gives it back.
    for (id, _) in &services {
        large.plan(&[(id.clone(), None)]);
    }
    large.plan(&[]);
    let slots = large.planner.usage().into_iter().find(|of| of.table == "slots").unwrap();
    assert_eq!(slots.used, 0);
}

#[test]
fn tables_shrink_before_anyone_gets_nothing_and_grow_back() {
    let small = Capacity { services: 600, slots: 10_000, backends: 3000, ranges: 10 };
    let mut large = Large::new(small);
    let services: Vec<_> = (0..200).map(|n| service(n, 16 * n..16 * n + 10)).collect();
    let length = |large: &Large, number: usize| {
        let vip = services[number].1.frontends.keys().next().unwrap();
        large.maps.services[vip].cluster.count
    };
    for one in &services[..40] {
        assert_eq!(large.plan(&[put(one)]), []);
    }
    large.settle();
    assert_eq!(length(&large, 0), 127);
    for one in &services[40..] {
        assert_eq!(large.plan(&[put(one)]), []);
    }
    large.settle();
    assert_eq!((length(&large, 0), length(&large, 199)), (31, 31));
    for (id, _) in &services[30..] {
        large.plan(&[(id.clone(), None)]);
    }
    large.settle();
    assert_eq!(length(&large, 0), 127);
}

#[test]
fn a_service_of_100_000_endpoints_gives_each_its_share() {
    let mut large = Large::new(Capacity::DEFAULT);
    let one = service(0, 0..100_000);
    assert_eq!(large.plan(&[put(&one)]), []);
    let vip = one.1.frontends.keys().next().unwrap();
    let choice = large.maps.services[vip].cluster;
    let mut shares = vec![0_u32; 100_000];
    (0..choice.count).for_each(|index| shares[large.maps.number(choice, index) as usize] += 1);
    let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
    assert!(*least > 0 && most - least <= 1, "{least} to {most} slots");
    // A slice of a hundred changes: what is written is theirs, and one run of numbers.
    let two = service(0, 100..100_100);
    let ops = large.planner.plan(large.now, &[put(&two)], &mut Vec::new());
    assert!(ops.len() <= 210, "{} writes", ops.len());
}

/// All that one plan brings is known before the first table of it is made.
#[test]
fn what_fits_with_shorter_tables_fits_with_one_plan() {
    let mut large = Large::new(Capacity::DEFAULT);
    let services: Vec<_> = (0..16_000).map(|n| service(n, 32 * n..32 * n + 20)).collect();
    assert_eq!(large.plan(&services.iter().map(put).collect::<Vec<_>>()), []);
    large.settle();
    services.iter().for_each(|(_, port)| assert_eq!(large.reached(port), addresses(port)));
}

/// The share of its first backend among the slots of a Service port, in percent.
fn first_share(large: &Large, port: &Port) -> u32 {
    let choice = large.maps.services[port.frontends.keys().next().unwrap()].cluster;
    let numbers = (0..choice.count).map(|index| large.maps.number(choice, index));
    let first = |number: &u32| {
        large.maps.backends[&(IpFamily::V4, *number)].address == port.backends[0].address
    };
    100 * u32::try_from(numbers.filter(first).count()).unwrap() / choice.count
}

/// However full the table was meanwhile.
#[test]
fn weights_survive_a_full_table() {
    let small = Capacity { services: 400, slots: 6_000, backends: 3000, ranges: 10 };
    let mut large = Large::new(small);
    let mut services: Vec<_> = (0..150).map(|n| service(n, 16 * n..16 * n + 10)).collect();
    for (_, port) in &mut services {
        port.backends[0].weight = 9;
    }
    for one in &services {
        large.plan(&[put(one)]);
        large.settle();
    }
    for (_, port) in &services {
        assert_eq!(large.reached(port), addresses(port));
        let share = first_share(&large, port);
        assert!((40..=60).contains(&share), "{share} %");
    }
}

/// While tables change their lengths and room comes and goes no frontend leads to what others have by now.
#[test]
fn with_a_full_table_no_frontend_is_left_on_what_was_given_back() {
    let small = Capacity { services: 400, slots: 3_000, backends: 3000, ranges: 10 };
    let mut large = Large::new(small);
    let one = |number: u32, version: u32| {
        let (id, mut port) = service(number, 16 * number + version..16 * number + version + 10);
        for access in port.frontends.values_mut() {
            access.local_for_outside = true;
        }
        for (position, backend) in port.backends.iter_mut().enumerate() {
            backend.usable_local = position % 3 == 0;
            backend.weight = if position == 0 { 3 } else { 1 };
        }
        (id, port)
    };
    for round in 0..6 {
        let count = if round % 2 == 0 { 160 } else { 40 };
        for number in 0..160 {
            let (id, port) = one(number, round % 4);
            large.plan(&[(id, (number < count).then_some(port))]);
            if number % 7 == 0 {
                large.plan(&[]);
            }
        }
        let led = (0..count).map(|number| one(number, round % 4).1);
        for port in led {
            let vip = port.frontends.keys().next().unwrap();
            let Some(_) = large.maps.services.get(vip) else { continue };
            for reached in large.maps.resolve(vip).1 {
                assert!(reached.is_subset(&addresses(&port)), "{vip:?} leads to {reached:?}");
            }
        }
    }
}
