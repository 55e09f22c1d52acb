//! Properties of the planner, over random histories of a small cluster: changes, conflicts, pauses,
//! and agents that are killed between any two writes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use portal::desired::{Access, Backend, Frontend, Port, PortId, Tables};
use portal::model::{IpFamily, ObjectName, Protocol};
use portal::plan::{
    Actual, ActualBackend, ActualService, BackendEntry, Capacity, Lead, Op, Planner,
};
use proptest::prelude::*;
use proxy_common::settings::ticks;
use proxy_common::tables::{Algorithm, Range, ServiceValue};

const CAPACITY: Capacity = Capacity { services: 200, slots: 8000, backends: 200, ranges: 100 };
const FAMILIES: [IpFamily; 2] = [IpFamily::V4, IpFamily::V6];

/// The kernel's maps, simulated.
#[derive(Clone, Default)]
struct Maps {
    services: BTreeMap<Frontend, Lead>,
    marks: BTreeMap<IpAddr, u32>,
    ranges: BTreeSet<(u32, IpNet)>,
    names: HashMap<u32, PortId>,
    slots: HashMap<u32, u32>,
    backends: HashMap<(IpFamily, u32), BackendEntry>,
}

impl Maps {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Backend { family, number, backend } => {
                self.backends.insert((*family, *number), *backend);
            }
            Op::Slot { index, number } => {
                self.slots.insert(*index, *number);
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

    /// Where a packet to a frontend may go, anywhere and on this node, and which Service port's it is.
    /// Fails if it leads to a place that makes no sense.
    fn resolve(&self, frontend: &Frontend) -> (PortId, [BTreeSet<SocketAddr>; 2]) {
        let Lead { id, cluster, local, .. } = self.services[frontend];
        let port = self.names.get(&id).expect("a frontend leads to a Service port with a name");
        let addresses = |range: Range| {
            let slots = range.first..range.first + range.count;
            let backends = slots.map(|slot| {
                let number = self.slots[&slot];
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

/// The agent's part of the work, on simulated maps.
struct Agent {
    planner: Planner,
    maps: Maps,
    /// What was wanted last.
    held: Tables,
    now: Instant,
}

impl Agent {
    fn new() -> Self {
        let (planner, maps) = (Planner::new(CAPACITY), Maps::default());
        Self { planner, maps, held: Tables::new(), now: Instant::now() }
    }

    fn restart(&mut self, wanted: &Tables) {
        let (planner, repairs) = Planner::recover(CAPACITY, &self.maps.actual());
        self.planner = planner;
        self.write(&repairs, wanted);
    }

    fn plan(&mut self, wanted: &Tables) -> Vec<Op> {
        let held: Vec<PortId> = self.planner.ports().cloned().collect();
        let gone = held.into_iter().filter(|port| !wanted.contains_key(port));
        let put = wanted.iter().map(|(port, tables)| (port.clone(), Some(tables.clone())));
        let changes: Vec<_> = gone.map(|port| (port, None)).chain(put).collect();
        self.planner.plan(self.now, &changes, &mut Vec::new())
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
            if matches!(op, Op::Slot { .. }) {
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

#[test]
fn without_room_for_maglevs_table_a_service_is_served_in_a_plain_way() {
    let small = Capacity { slots: 3, ..CAPACITY };
    let id = port_ids().next().unwrap();
    let backend = |host| Backend {
        address: SocketAddr::new(address(IpFamily::V4, host), 8080),
        usable: true,
        usable_local: false,
        serving: true,
        local: false,
        weight: 1,
    };
    let vip = Frontend { vip: address(IpFamily::V4, 1), port: 80, protocol: Protocol::Tcp };
    let wanted = Port {
        frontends: [(vip, Access::default())].into(),
        backends: (10..13).map(backend).collect(),
        ..Port::default()
    };
    let mut agent = Agent { planner: Planner::new(small), ..Agent::new() };
    let tables = Tables::from([(id.clone(), wanted.clone())]);
    let ops = agent.plan(&tables);
    agent.write(&ops, &tables);
    agent.maps.assert_holds(&tables);
    assert_eq!(agent.maps.services[&vip].cluster.count, 3);
    // What it has, it keeps: a change of something else needs no room.
    agent.held = tables;
    let tables = Tables::from([(id, Port { affinity: 100, ..wanted })]);
    let ops = agent.plan(&tables);
    assert!(matches!(ops.as_slice(), [Op::Lead { .. }]), "{ops:?}");
    agent.write(&ops, &tables);
    agent.maps.assert_holds(&tables);
}
