//! The datapath's surroundings on the host: a packet as a vector, tables as ordinary collections. Behind
//! feature `testing`; never shipped.

mod buffer;
mod call;
mod interests;
mod tables;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use bytemuck::{Pod, Zeroable};
use proxy_common::settings::Settings;
use proxy_common::tables::{
    AffinityValue, Algorithm, Arrivals, Backend, Choice, EmbryoValue, FlowKey, FlowValue,
    FragmentValue, PeerValue, Range, ServiceKey, ServiceValue, ShortCut, Way, Work,
};
use proxy_common::testing::{Hook, LINK, MTU, NODE, Records, Service as ServiceSpec};
use proxy_common::{Family, Outcome, Port, V4, V6};

use crate::datapath::relay::relay;
use crate::datapath::{Client, Next, Service, Tables, Verdict, fast, tell};
use crate::packet::{Frame, Wire};
pub use buffer::{Buffer, Note};
pub use call::Call;
pub use interests::Interests;

/// The bytes of a key: map types have no order of their own.
fn bytes<T: Pod>(key: &T) -> Vec<u8> {
    bytemuck::bytes_of(key).to_vec()
}

fn is_within(address: IpAddr, range: IpAddr, bits: u8) -> bool {
    let number = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
        IpAddr::V6(ip) => u128::from(ip),
    };
    let differences = number(address) ^ number(range);
    bits == 0 || differences >> (128 - u32::from(bits)) == 0
}

fn index(number: usize) -> u32 {
    u32::try_from(number).expect("it is small")
}

/// One family's tables.
pub struct Host<F: Family> {
    /// What the agent tells its programs.
    pub settings: Settings,
    /// The time, in ticks.
    pub now: Cell<u32>,
    random: Cell<u32>,
    /// The way that leads to backends.
    pub way: Way<F>,
    /// The pods' range.
    pub pods: Option<(IpAddr, u8)>,
    /// How many TCP flows have begun, and in which tick.
    pub arrivals: Cell<Arrivals>,
    /// Connections whose clients have answered a challenge, and when.
    pub verified: RefCell<BTreeMap<Vec<u8>, u32>>,
    /// The node's address on its link, for what is masqueraded there.
    pub exit: Option<IpAddr>,
    /// How many records the table of answered flows holds.
    pub capacity: usize,
    services: BTreeMap<Vec<u8>, Service>,
    /// What is of interest.
    pub interests: Interests,
    slots: Vec<u32>,
    /// Source ranges: Service port, range and its bits.
    pub ranges: Vec<(u32, IpAddr, u8)>,
    affinity: RefCell<BTreeMap<Vec<u8>, AffinityValue>>,
    /// Backends by number.
    pub backends: Vec<Backend<F>>,
    /// Flows by backend.
    pub loads: RefCell<BTreeMap<u32, u32>>,
    turns: RefCell<BTreeMap<u32, u32>>,
    flows: RefCell<Records<F, FlowValue<F>>>,
    embryos: RefCell<Records<F, EmbryoValue<F>>>,
    /// Flows that short cuts were asked for.
    pub wishes: RefCell<Vec<FlowKey<F>>>,
    port_turns: RefCell<BTreeMap<u32, u32>>,
    /// Flows that got no source port, by backend.
    pub exhausted: RefCell<BTreeMap<u32, u64>>,
    /// Packets and bytes by Service port.
    pub traffic: RefCell<BTreeMap<u32, (u64, u64)>>,
    /// Sockets of the host: who is at the other end of each, and where it is.
    pub sockets: Vec<(SocketAddr, SocketAddr)>,
    /// Addresses that sockets of the host are bound to.
    pub listeners: Vec<SocketAddr>,
    /// Links that lead to addresses.
    pub routes: Vec<(IpAddr, u32)>,
    fragments: RefCell<BTreeMap<Vec<u8>, FragmentValue>>,
    peers: RefCell<BTreeMap<Vec<u8>, PeerValue<F>>>,
    /// How often it was noted what a socket asked for.
    pub noted: Cell<u32>,
    /// How many packets were sent on before the host stack.
    pub relayed: Cell<u32>,
    /// How often there was each outcome.
    pub counted: RefCell<BTreeMap<Outcome, u32>>,
    /// With what packets before have left in it, as in the kernel.
    work: RefCell<Work<F>>,
}

/// A family with what the host needs to know of it.
pub trait HostFamily: Wire {
    /// The address in the family's shape; `None` if it is of the other one.
    fn address(ip: IpAddr) -> Option<Self::Addr>;
}

impl HostFamily for V4 {
    fn address(ip: IpAddr) -> Option<Self::Addr> {
        match ip {
            IpAddr::V4(ip) => Some(ip.into()),
            IpAddr::V6(_) => None,
        }
    }
}

impl HostFamily for V6 {
    fn address(ip: IpAddr) -> Option<Self::Addr> {
        match ip {
            IpAddr::V6(ip) => Some(ip.into()),
            IpAddr::V4(_) => None,
        }
    }
}

impl<F: HostFamily> Default for Host<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F: HostFamily> Host<F> {
    /// Empty tables.
    pub fn new() -> Self {
        Self {
            settings: Settings::DEFAULT,
            now: Cell::new(1),
            random: Cell::new(1),
            relayed: Cell::new(0),
            way: Way { source: node::<F>(), link: LINK, mtu: MTU, pad: 0, hop: F::Addr::zeroed() },
            pods: None,
            arrivals: Cell::new(Arrivals { tick: 0, count: 0 }),
            verified: RefCell::default(),
            exit: None,
            capacity: usize::MAX,
            services: BTreeMap::new(),
            interests: Interests::default(),
            slots: Vec::new(),
            ranges: Vec::new(),
            affinity: RefCell::default(),
            backends: Vec::new(),
            loads: RefCell::default(),
            turns: RefCell::default(),
            flows: RefCell::default(),
            embryos: RefCell::default(),
            wishes: RefCell::default(),
            port_turns: RefCell::default(),
            exhausted: RefCell::default(),
            traffic: RefCell::default(),
            sockets: Vec::new(),
            listeners: Vec::new(),
            routes: Vec::new(),
            fragments: RefCell::default(),
            peers: RefCell::default(),
            noted: Cell::new(0),
            counted: RefCell::default(),
            work: RefCell::new(Work::zeroed()),
        }
    }

    /// Puts a frontend or a mark.
    pub fn put(&mut self, key: &ServiceKey<F>, service: Service) {
        match key.interest(service.flags) {
            Some(kind) => self.interests.add(&key.vip, kind),
            None => self.interests.take_port(key.port),
        }
        self.services.insert(bytes(key), service);
    }

    /// Puts a backend's number into a slot.
    pub fn set_slot(&mut self, slot: u32, number: u32) {
        let slot = slot as usize;
        self.slots.resize(self.slots.len().max(slot + 1), u32::MAX);
        self.slots[slot] = number;
    }

    /// Puts a backend in its place.
    pub fn set_backend(&mut self, number: u32, backend: Backend<F>) {
        self.interests.add_server(&backend.addr, backend.port);
        let number = number as usize;
        self.backends.resize(self.backends.len().max(number + 1), Backend::zeroed());
        self.backends[number] = backend;
    }

    /// Serves these Services and no others. Backends of before are withdrawn.
    pub fn serve(&mut self, services: &[ServiceSpec]) {
        self.services.clear();
        self.ranges.clear();
        self.backends.iter_mut().for_each(|backend| backend.flags = 0);
        self.mark(node::<F>(), ServiceValue::NODE | ServiceValue::NODE_PORTS);
        for (id, service) in (1..).zip(services) {
            let Some(vip) = F::address(service.frontend.ip()) else { continue };
            let port = Port::new(service.frontend.port());
            let cluster = self.slots_of(id, service, &service.backends);
            let local = self.slots_of(id, service, &service.local);
            let (affinity, flags) = (service.affinity, service.flags);
            let value = Service { id, cluster, local, affinity, flags };
            self.put(&ServiceKey::new(vip, port, service.proto), value);
            if !service.frontend.ip().is_unspecified() {
                self.mark(vip, flags & ServiceValue::REFUSES);
            }
            let ranges = service.ranges.iter().filter(|(ip, _)| F::address(*ip).is_some());
            self.ranges.extend(ranges.map(|(ip, bits)| (id, *ip, *bits)));
        }
    }

    /// Says what an address is.
    pub fn mark(&mut self, address: F::Addr, flags: u32) {
        let none = Choice::default();
        let value = Service { id: 0, cluster: none, local: none, affinity: 0, flags };
        self.put(&ServiceKey::mark(address), value);
    }

    /// A run of slots with these backends.
    fn slots_of(&mut self, id: u32, service: &ServiceSpec, backends: &[SocketAddr]) -> Choice {
        let members = index(self.slots.len());
        for at in backends {
            let Some(addr) = F::address(at.ip()) else { continue };
            let port = Port::new(at.port());
            let known =
                self.backends.iter().position(|b| (b.addr, b.port, b.service) == (addr, port, id));
            let number = known.unwrap_or(self.backends.len());
            let local = service.local.contains(at);
            let kinds = Backend::<F>::SERVING | Backend::<F>::IN_CLUSTER;
            let here = Backend::<F>::LOCAL | Backend::<F>::IN_LOCAL;
            let by_load = Algorithm::LeastConn.is_in(service.flags);
            let counted = if by_load { Backend::<F>::COUNTED } else { 0 };
            let flags = kinds | counted | if local { here } else { 0 };
            let backend = Backend {
                addr,
                port,
                generation: 1,
                flags,
                service: id,
                way: 1,
                weight: 1,
                pad: 0,
            };
            self.interests.add_server(&backend.addr, backend.port);
            match known {
                Some(known) => self.backends[known] = backend,
                None => self.backends.push(backend),
            }
            self.slots.push(index(number));
        }
        let count = index(self.slots.len()) - members;
        Choice { table: Range::NO_TABLE, count, members }
    }

    /// A packet is seen at a hook: what is done with it, and what it is then.
    pub fn see(&self, hook: Hook, frame: &[u8]) -> (Outcome, Vec<u8>) {
        let mut buffer = Buffer::new(frame);
        let outcome = self.see_buffer(hook, &mut buffer);
        (outcome, buffer.bytes)
    }

    /// As [`Host::see`], of a packet that may refuse to be changed.
    pub fn see_buffer(&self, hook: Hook, buffer: &mut Buffer) -> Outcome {
        self.verdict(hook, buffer).outcome
    }

    /// As [`Host::see_buffer`], with the link that the packet is sent out of past the stack; 0 if it is not.
    pub fn verdict(&self, hook: Hook, buffer: &mut Buffer) -> Verdict {
        buffer.sockets.clone_from(&self.sockets);
        buffer.listeners.clone_from(&self.listeners);
        buffer.routes.clone_from(&self.routes);
        let relayed = (hook == Hook::Uplink).then(|| self.relay(buffer)).flatten();
        let verdict = see(self, hook, buffer, &mut self.work.borrow_mut());
        if let Some((by_relay, bytes)) = relayed {
            assert_eq!((by_relay, &bytes), (verdict, &buffer.bytes), "XDP does what tc does");
            self.relayed.set(self.relayed.get() + 1);
        }
        verdict
    }

    /// What becomes of a packet at XDP, if it does not pass, and what it is then.
    pub fn at_xdp(&self, frame: &[u8]) -> Option<(Outcome, Vec<u8>)> {
        let mut buffer = Buffer::new(frame);
        buffer.want(usize::MAX);
        let verdict = relay(&mut buffer, self, |frame, _, _| frame.load(0))?;
        Some((verdict.outcome, buffer.bytes))
    }

    /// What becomes of a packet before the host stack, if something does; without a trace in the tables.
    fn relay(&self, buffer: &Buffer) -> Option<(Verdict, Vec<u8>)> {
        let records = self.flows.borrow().all();
        let mut copy = buffer.clone();
        copy.want(usize::MAX);
        let relayed = relay(&mut copy, self, |frame, _, _| frame.load(0));
        match relayed {
            Some(_) => records.iter().for_each(|(key, value)| self.replace_flow(key, value)),
            None => assert_eq!(copy.bytes, buffer.bytes, "what passes is untouched"),
        }
        Some((relayed?, copy.bytes))
    }

    /// A packet passes the node from uplink to uplink, through its host stack: what is done with it where it leaves, or
    /// where it came in if it goes no further or is nobody's.
    pub fn pass(&self, frame: &[u8]) -> (Outcome, Vec<u8>) {
        let mut buffer = Buffer::new(frame);
        let outcome = self.see_buffer(Hook::Uplink, &mut buffer);
        let goes_on =
            [Outcome::Opened, Outcome::Forwarded, Outcome::Established, Outcome::Masqueraded];
        if !goes_on.contains(&outcome) {
            return (outcome, buffer.bytes);
        }
        let outcome = self.see_buffer(Hook::Egress, &mut buffer);
        (outcome, buffer.bytes)
    }

    /// Gives a short cut to each flow that one was asked for, as the agent does. How many got one.
    pub fn grant(&self) -> usize {
        let wishes = self.wishes.take();
        let granted = wishes.into_iter().filter_map(|key| {
            let record = |key: &FlowKey<F>| self.flows.borrow().value(key);
            let ShortCut { asked, answered, .. } = ShortCut::of(key, record)?;
            self.replace_flow(&asked.0, &asked.1);
            self.replace_flow(&answered.0, &answered.1);
            Some(())
        });
        granted.count()
    }

    /// How many records of live flows there are.
    pub fn flows(&self) -> usize {
        self.flows.borrow().len()
    }

    /// The records of live flows.
    pub fn live(&self) -> Vec<(FlowKey<F>, FlowValue<F>)> {
        self.flows.borrow().all()
    }

    /// The records of flows that are not live.
    pub fn embryos(&self) -> Vec<(FlowKey<F>, EmbryoValue<F>)> {
        self.embryos.borrow().all()
    }

    /// Evicts a record that is not a live flow's, as the kernel does with the oldest.
    pub fn evict(&self, key: &FlowKey<F>) {
        self.remove_embryo(key);
    }
}

/// The node's address of a family.
fn node<F: HostFamily>() -> F::Addr {
    NODE.iter().find_map(|ip| F::address(*ip)).expect("one of each family")
}

/// A packet is seen at a hook: first by the program for every packet, then by those that it calls.
pub fn see<F: Wire, P: Frame, T: Tables<F>>(
    tables: &T,
    hook: Hook,
    frame: &mut P,
    work: &mut Work<F>,
) -> Verdict {
    let mut next = match hook {
        Hook::Ingress => fast::ingress(frame, tables, Client::Pod, || Some(&mut *work)),
        Hook::Uplink => fast::ingress(frame, tables, Client::Outside, || Some(&mut *work)),
        Hook::Egress => fast::egress(frame, tables, Client::Outside, || Some(&mut *work)),
        Hook::ToPod => fast::egress(frame, tables, Client::Pod, || Some(&mut *work)),
    };
    loop {
        match next {
            Next::Done(verdict) => {
                tables.count(verdict.outcome, 1);
                return verdict;
            }
            Next::Counted(verdict) => return verdict,
            Next::Story(story) => next = tell(story, frame, tables, work),
        }
    }
}
