//! The datapath's surroundings on the host: a packet as a vector, tables as ordinary collections.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ptr::NonNull;

use bytemuck::{Pod, Zeroable};
use proxy_common::checksum::Delta;
use proxy_common::settings::Settings;
use proxy_common::tables::{
    Backend, FlowKey, FlowRecord, FlowValue, FragmentKey, FragmentValue, PeerKey, PeerValue, Range,
    ServiceKey, Side, Work,
};
use proxy_common::testing::Service as ServiceSpec;
use proxy_common::{Family, Outcome, Port, V4, V6};
use proxy_ebpf::datapath::{self, Refused, Service, Tables};
use proxy_ebpf::packet::{Frame, Wire};

/// A packet whose end may lie in other memory than its start, as a socket buffer's.
pub struct Buffer {
    pub bytes: Vec<u8>,
    reachable: usize,
    /// Whether it may be changed.
    pub writable: bool,
}

impl Buffer {
    pub fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), reachable: 0, writable: true }
    }

    fn end<T>(&self, offset: usize) -> Option<usize> {
        offset.checked_add(size_of::<T>()).filter(|end| *end <= self.reachable)
    }
}

impl Frame for Buffer {
    const NETWORK: usize = 14;

    fn want(&mut self, length: usize) {
        self.reachable = self.reachable.max(length.min(self.bytes.len()));
    }

    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        let end = self.end::<T>(offset)?;
        Some(bytemuck::pod_read_unaligned(&self.bytes[offset..end]))
    }

    fn store<T: Pod>(&mut self, offset: usize, value: T) -> Option<()> {
        let end = self.end::<T>(offset).filter(|_| self.writable)?;
        self.bytes[offset..end].copy_from_slice(bytemuck::bytes_of(&value));
        Some(())
    }

    fn resize(&mut self, length: usize) -> Option<()> {
        self.bytes.resize(length, 0);
        self.reachable = length;
        self.writable.then_some(())
    }

    fn fix_l4(&mut self, offset: usize, pseudo: Delta, body: Delta, optional: bool) -> Option<()> {
        let place = self.bytes.get_mut(offset..offset + 2)?;
        let old = u16::from_ne_bytes([place[0], place[1]]);
        if optional && old == 0 {
            return Some(());
        }
        let new = (pseudo + body).apply(old);
        let new = if optional && new == 0 { 0xffff } else { new };
        place.copy_from_slice(&new.to_ne_bytes());
        self.writable.then_some(())
    }
}

/// The bytes of a key: map types have no order of their own.
fn bytes<T: Pod>(key: &T) -> Vec<u8> {
    bytemuck::bytes_of(key).to_vec()
}

fn index(number: usize) -> u32 {
    u32::try_from(number).expect("it is small")
}

type Records<F> = RefCell<BTreeMap<Vec<u8>, NonNull<FlowValue<F>>>>;

/// One family's tables.
pub struct Host<F: Family> {
    pub settings: Settings,
    pub now: Cell<u32>,
    /// How many records the table of answered flows holds.
    pub capacity: usize,
    services: BTreeMap<Vec<u8>, Service>,
    slots: Vec<u32>,
    backends: Vec<Backend<F>>,
    flows: Records<F>,
    embryos: Records<F>,
    fragments: RefCell<BTreeMap<Vec<u8>, FragmentValue>>,
    peers: RefCell<BTreeMap<Vec<u8>, PeerValue<F>>>,
    pub counted: RefCell<BTreeSet<Outcome>>,
    /// With what packets before have left in it, as in the kernel.
    work: RefCell<Work<F>>,
}

/// A family with what the host needs to know of it.
pub trait HostFamily: Wire {
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

impl<F: HostFamily> Host<F> {
    pub fn new() -> Self {
        Self {
            settings: Settings::DEFAULT,
            now: Cell::new(1),
            capacity: usize::MAX,
            services: BTreeMap::new(),
            slots: Vec::new(),
            backends: Vec::new(),
            flows: RefCell::default(),
            embryos: RefCell::default(),
            fragments: RefCell::default(),
            peers: RefCell::default(),
            counted: RefCell::default(),
            work: RefCell::new(Work::zeroed()),
        }
    }

    /// Serves these Services and no others. Backends of before are withdrawn.
    pub fn serve(&mut self, services: &[ServiceSpec]) {
        self.services.clear();
        let end = |at: SocketAddr| F::address(at.ip()).map(|ip| (ip, Port::new(at.port())));
        let wanted: BTreeSet<SocketAddr> =
            services.iter().flat_map(|service| service.backends.clone()).collect();
        for backend in &mut self.backends {
            let at = SocketAddr::new(backend.addr.into(), backend.port.number());
            backend.flags = u32::from(wanted.contains(&at));
        }
        for (id, service) in (1..).zip(services) {
            let Some((vip, port)) = end(service.frontend) else { continue };
            let first = index(self.slots.len());
            for (addr, port) in service.backends.iter().filter_map(|backend| end(*backend)) {
                let known = self.backends.iter().position(|b| (b.addr, b.port) == (addr, port));
                let number = known.unwrap_or(self.backends.len());
                if known.is_none() {
                    self.backends.push(Backend {
                        addr,
                        port,
                        generation: 1,
                        flags: 1,
                        service: id,
                    });
                }
                self.slots.push(index(number));
            }
            let range = Range { first, count: index(self.slots.len()) - first };
            let vip_key = ServiceKey::<F>::vip(vip);
            self.services.insert(bytes(&vip_key), Service { id: 0, range: Range::default() });
            let key = ServiceKey::<F>::new(vip, port, service.proto);
            self.services.insert(bytes(&key), Service { id, range });
        }
    }

    /// A packet is seen at a hook: what is done with it, and what it is then.
    pub fn see(&self, side: Side, frame: &[u8]) -> (Outcome, Vec<u8>) {
        let mut buffer = Buffer::new(frame);
        let outcome = self.see_buffer(side, &mut buffer);
        (outcome, buffer.bytes)
    }

    pub fn see_buffer(&self, side: Side, buffer: &mut Buffer) -> Outcome {
        let mut work = self.work.borrow_mut();
        let work = &mut *work;
        let outcome = match side {
            Side::Ingress => datapath::ingress(buffer, self, work),
            Side::Egress => datapath::egress(buffer, self, work),
        };
        self.count(outcome);
        outcome
    }

    /// How many records of answered flows there are.
    pub fn flows(&self) -> usize {
        self.flows.borrow().len()
    }
}

fn find<'a, F: Family>(records: &Records<F>, key: &FlowKey<F>) -> Option<FlowRecord<'a, F>> {
    let value = *records.borrow().get(&bytes(key))?;
    // SAFETY: values are leaked and reached through records only.
    Some(unsafe { FlowRecord::new(value) })
}

fn insert<F: Family>(
    records: &Records<F>,
    key: &FlowKey<F>,
    value: &FlowValue<F>,
    capacity: usize,
) -> Result<(), Refused> {
    let mut records = records.borrow_mut();
    let key = bytes(key);
    if records.contains_key(&key) {
        return Err(Refused::Exists);
    }
    if records.len() >= capacity {
        return Err(Refused::Full);
    }
    // Leaked, as the kernel keeps a deleted element readable: a record may outlive its removal.
    records.insert(key, NonNull::from(Box::leak(Box::new(*value))));
    Ok(())
}

impl<F: HostFamily> Tables<F> for Host<F> {
    fn setting<T: Copy>(&self, field: impl Fn(&Settings) -> &T) -> T {
        *field(&self.settings)
    }

    fn now(&self) -> u32 {
        self.now.get()
    }

    fn count(&self, outcome: Outcome) {
        self.counted.borrow_mut().insert(outcome);
    }

    fn service(&self, key: &ServiceKey<F>) -> Option<Service> {
        self.services.get(&bytes(key)).copied()
    }

    fn slot(&self, index: u32) -> Option<u32> {
        self.slots.get(index as usize).copied()
    }

    fn backend(&self, number: u32) -> Option<Backend<F>> {
        self.backends.get(number as usize).copied()
    }

    fn flow(&self, key: &FlowKey<F>) -> Option<FlowRecord<'_, F>> {
        find(&self.flows, key)
    }

    fn embryo(&self, key: &FlowKey<F>) -> Option<FlowRecord<'_, F>> {
        find(&self.embryos, key)
    }

    fn insert_flow(&self, key: &FlowKey<F>, value: &FlowValue<F>) -> Result<(), Refused> {
        insert(&self.flows, key, value, self.capacity)
    }

    fn insert_embryo(&self, key: &FlowKey<F>, value: &FlowValue<F>) -> Result<(), Refused> {
        insert(&self.embryos, key, value, usize::MAX)
    }

    fn remove(&self, key: &FlowKey<F>) {
        self.flows.borrow_mut().remove(&bytes(key));
        self.remove_embryo(key);
    }

    fn remove_embryo(&self, key: &FlowKey<F>) {
        self.embryos.borrow_mut().remove(&bytes(key));
    }

    fn fragment(&self, key: &FragmentKey<F>) -> Option<FragmentValue> {
        self.fragments.borrow().get(&bytes(key)).copied()
    }

    fn remember_fragment(&self, key: &FragmentKey<F>, value: FragmentValue) {
        self.fragments.borrow_mut().insert(bytes(key), value);
    }

    fn peer(&self, key: &PeerKey<F>) -> Option<PeerValue<F>> {
        self.peers.borrow().get(&bytes(key)).copied()
    }

    fn remember_peer(&self, key: &PeerKey<F>, value: &PeerValue<F>) {
        self.peers.borrow_mut().insert(bytes(key), *value);
    }
}
