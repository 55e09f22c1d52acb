//! Properties of the planner, over random histories of a small cluster: changes, conflicts, pauses,
//! and agents that are killed between any two writes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use portal::desired::{Backend, Frontend, Port, PortId, Tables};
use portal::model::{IpFamily, ObjectName, Protocol};
use portal::plan::{Actual, ActualBackend, ActualService, BackendEntry, Capacity, Op, Planner};
use proptest::prelude::*;
use proxy_common::tables::Range;

const CAPACITY: Capacity = Capacity { services: 200, slots: 400, backends: 200 };
const FAMILIES: [IpFamily; 2] = [IpFamily::V4, IpFamily::V6];

/// The kernel's maps, simulated.
#[derive(Clone, Default)]
struct Maps {
    services: BTreeMap<Frontend, (u32, Range)>,
    vips: BTreeSet<IpAddr>,
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
            Op::Lead { frontend, id, range } => {
                self.services.insert(*frontend, (*id, *range));
            }
            Op::Remove { frontend } => {
                self.services.remove(frontend).expect("removes what is there");
            }
            Op::MarkVip { vip } => assert!(self.vips.insert(*vip), "{vip} was marked already"),
            Op::UnmarkVip { vip } => assert!(self.vips.remove(vip), "{vip} was not marked"),
        }
    }

    /// What a restarted agent reads. The maps of names do not know families.
    fn actual(&self) -> Actual {
        let services = self.services.iter().map(|(frontend, (id, range))| ActualService {
            frontend: *frontend,
            id: *id,
            range: *range,
        });
        let backends = self.backends.iter().map(|((family, number), entry)| ActualBackend {
            family: *family,
            number: *number,
            entry: *entry,
        });
        let nameless = |port: &PortId| PortId { family: IpFamily::V4, ..port.clone() };
        Actual {
            services: services.collect(),
            vips: self.vips.iter().copied().collect(),
            names: self.names.iter().map(|(id, port)| (*id, nameless(port))).collect(),
            backends: backends.collect(),
            slots: self.slots.clone(),
        }
    }

    /// Where a packet to a frontend may go, and which Service port's it is. Fails if it leads to a
    /// place that makes no sense.
    fn resolve(&self, frontend: &Frontend) -> (PortId, BTreeSet<SocketAddr>) {
        let (id, range) = self.services[frontend];
        let port = self.names.get(&id).expect("a frontend leads to a Service port with a name");
        let slots = range.first..range.first + range.count;
        let backends = slots.map(|slot| {
            let number = self.slots[&slot];
            let entry = self.backends[&(IpFamily::of(frontend.vip), number)];
            assert_eq!(entry.service, id, "a slot leads to another Service port's backend");
            entry.address
        });
        let backends: Vec<SocketAddr> = backends.collect();
        let addresses: BTreeSet<SocketAddr> = backends.iter().copied().collect();
        assert_eq!(addresses.len(), backends.len(), "a backend has two slots");
        (port.clone(), addresses)
    }

    fn resolved(&self) -> impl Iterator<Item = (PortId, BTreeSet<SocketAddr>)> {
        self.services.keys().map(|frontend| self.resolve(frontend))
    }

    /// Asserts that the maps hold `wanted` and nothing else.
    fn assert_holds(&self, wanted: &Tables) {
        let winners = winners(wanted);
        let led: BTreeMap<Frontend, PortId> =
            self.services.keys().map(|f| (*f, self.resolve(f).0)).collect();
        assert_eq!(led, winners);
        assert_eq!(self.vips, winners.keys().map(|frontend| frontend.vip).collect());
        let names: BTreeSet<&PortId> = self.names.values().collect();
        assert_eq!(names, wanted.keys().collect());
        assert_eq!(names.len(), self.names.len(), "a Service port has two numbers");
        for (frontend, port) in &winners {
            assert_eq!(self.resolve(frontend).1, usable(&wanted[port]));
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

fn usable(port: &Port) -> BTreeSet<SocketAddr> {
    port.backends.iter().filter(|b| b.usable).map(|b| b.address).collect()
}

/// Who has each frontend: the oldest, then the first by name.
fn winners(wanted: &Tables) -> BTreeMap<Frontend, PortId> {
    let mut claims: BTreeMap<Frontend, (&str, &PortId)> = BTreeMap::new();
    for (id, port) in wanted {
        for frontend in &port.frontends {
            let claim = (port.created.as_str(), id);
            claims.entry(*frontend).and_modify(|best| *best = claim.min(*best)).or_insert(claim);
        }
    }
    claims.into_iter().map(|(frontend, (_, port))| (frontend, port.clone())).collect()
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
    let frontends = proptest::collection::btree_set((0..2_u8, 80..82_u16), 0..4);
    let backends = proptest::collection::btree_map(10..16_u8, any::<bool>(), 0..5);
    (1..4_u8, frontends, backends).prop_map(move |(created, frontends, backends)| Port {
        created: created.to_string(),
        frontends: frontends
            .into_iter()
            .map(|(vip, port)| Frontend {
                vip: address(family, vip),
                port,
                protocol: Protocol::Tcp,
            })
            .collect(),
        backends: backends
            .into_iter()
            .map(|(host, usable)| {
                let address = SocketAddr::new(address(family, host), 8080);
                Backend { address, usable, serving: true, local: host % 2 == 0 }
            })
            .collect(),
    })
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
        let mut gone: Vec<PortId> = self.planner.ports().cloned().collect();
        gone.retain(|port| !wanted.contains_key(port));
        let gone = gone.iter().map(|port| (port, None));
        let mut refusals = Vec::new();
        let mut ops = Vec::new();
        for (port, tables) in gone.chain(wanted.iter().map(|(port, tables)| (port, Some(tables)))) {
            ops.extend(self.planner.plan(self.now, port, tables, &mut refusals));
        }
        ops
    }

    /// Writes, and looks after each write whether every frontend leads to all the backends that its
    /// Service port had or is to have.
    fn write(&mut self, ops: &[Op], wanted: &Tables) {
        for op in ops {
            self.maps.apply(op);
            for (port, backends) in self.maps.resolved() {
                let is = |tables: &Tables| tables.get(&port).is_some_and(|p| usable(p) == backends);
                let whole = is(&self.held) || is(wanted);
                assert!(whole, "{port:?} is half changed after {op:?}");
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
