//! The tables as the datapath sees them.

use std::cell::RefCell;
use std::net::IpAddr;

use bytemuck::Pod;
use proxy_common::settings::Settings;
use proxy_common::tables::{
    AffinityKey, AffinityValue, Arrivals, Backend, EmbryoRecord, EmbryoValue, ExitKey, FlowKey,
    FlowRecord, FlowValue, FragmentKey, FragmentValue, Kind, Kinds, PeerKey, PeerValue, ServiceKey,
    SourceRange, Way,
};
use proxy_common::testing::{LINK, Records};
use proxy_common::{Family, Outcome, Port};

use super::{Host, HostFamily, bytes, is_within};
use crate::datapath::{Refused, Service, Tables};

fn insert<F: Family, V: Pod>(
    records: &RefCell<Records<F, V>>,
    key: &FlowKey<F>,
    value: &V,
    capacity: usize,
) -> Result<(), Refused> {
    let mut records = records.borrow_mut();
    if records.has(key) {
        return Err(Refused::Exists);
    }
    if records.len() >= capacity {
        return Err(Refused::Full);
    }
    records.put(key, *value);
    Ok(())
}

impl<F: HostFamily> Tables<F> for Host<F> {
    fn setting<T: Copy>(&self, field: impl Fn(&Settings) -> &T) -> T {
        *field(&self.settings)
    }

    fn now(&self) -> u32 {
        self.now.get()
    }

    fn microseconds(&self) -> u32 {
        self.now.get().wrapping_mul(1_073_742)
    }

    fn random(&self) -> u32 {
        let next = self.random.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.random.set(next);
        next
    }

    fn count(&self, outcome: Outcome, times: u32) {
        *self.counted.borrow_mut().entry(outcome).or_default() += times;
    }

    fn service(&self, key: &ServiceKey<F>) -> Option<Service> {
        self.services.get(&bytes(key)).copied()
    }

    fn has_service(&self, key: &ServiceKey<F>) -> bool {
        self.services.contains_key(&bytes(key))
    }

    fn slot(&self, index: u32) -> Option<u32> {
        self.slots.get(index as usize).copied()
    }

    fn backend(&self, number: u32) -> Option<Backend<F>> {
        self.backends.get(number as usize).copied()
    }

    fn way(&self, number: u32) -> Option<Way<F>> {
        (number == 1).then_some(self.way)
    }

    fn interest(&self, address: &F::Addr) -> Kinds {
        let own = [Some(self.way.source), self.exit.and_then(F::address)];
        let kinds = self.interests.of(address);
        if own.contains(&Some(*address)) { kinds.with(Kind::Node) } else { kinds }
    }

    fn is_server(&self, address: &F::Addr, port: Port) -> bool {
        self.interests.has_server(address, port)
    }

    fn take_port(&self, port: Port) {
        self.interests.take_port(port);
    }

    fn is_port(&self, port: Port) -> bool {
        self.interests.has_port(port)
    }

    fn load(&self, backend: u32) -> u32 {
        self.loads.borrow().get(&backend).copied().unwrap_or_default()
    }

    fn count_flow(&self, backend: u32, more: bool) {
        let mut loads = self.loads.borrow_mut();
        let load = loads.entry(backend).or_default();
        *load = if more { *load + 1 } else { load.saturating_sub(1) };
    }

    fn turn(&self, service: u32) -> u32 {
        let mut turns = self.turns.borrow_mut();
        let turn = turns.entry(service).or_default();
        *turn += 1;
        *turn - 1
    }

    fn affinity(&self, key: &AffinityKey<F>) -> Option<AffinityValue> {
        self.affinity.borrow().get(&bytes(key)).copied()
    }

    fn remember_affinity(&self, key: &AffinityKey<F>, value: &AffinityValue) {
        self.affinity.borrow_mut().insert(bytes(key), *value);
    }

    fn is_in_range(&self, key: &SourceRange<F>) -> bool {
        assert_eq!(key.prefix, 32 + u32::from(F::BITS));
        let id = u32::from_be_bytes(key.data.service);
        let client: IpAddr = key.data.address.into();
        self.ranges
            .iter()
            .any(|(service, range, bits)| *service == id && is_within(client, *range, *bits))
    }

    fn is_pod(&self, address: &F::Addr) -> bool {
        self.pods.is_some_and(|(range, bits)| is_within((*address).into(), range, bits))
    }

    fn arrivals(&self) -> Arrivals {
        self.arrivals.get()
    }

    fn count_arrival(&self, now: u32) -> u32 {
        self.arrivals.set(self.arrivals.get().one_more(now));
        self.arrivals.get().count
    }

    fn verified(&self, key: &FlowKey<F>) -> Option<u32> {
        self.verified.borrow().get(&bytes(key)).copied()
    }

    fn verify(&self, key: &FlowKey<F>, now: u32) {
        self.verified.borrow_mut().insert(bytes(key), now);
    }

    fn exit(&self, key: &ExitKey<F>) -> Option<F::Addr> {
        assert_eq!(key.data.link, LINK.to_be_bytes());
        self.exit.and_then(F::address)
    }

    fn flow(&self, key: &FlowKey<F>) -> Option<FlowRecord<'_, F>> {
        self.flows.borrow().flow(key)
    }

    fn embryo(&self, key: &FlowKey<F>) -> Option<EmbryoRecord<'_, F>> {
        self.embryos.borrow().embryo(key)
    }

    fn insert_flow(&self, key: &FlowKey<F>, value: &FlowValue<F>) -> Result<(), Refused> {
        insert(&self.flows, key, value, self.capacity)
    }

    fn replace_flow(&self, key: &FlowKey<F>, value: &FlowValue<F>) {
        let mut flows = self.flows.borrow_mut();
        if flows.has(key) {
            flows.put(key, *value);
        }
    }

    fn wish(&self, key: &FlowKey<F>) {
        self.wishes.borrow_mut().push(*key);
    }

    fn insert_embryo(&self, key: &FlowKey<F>, value: &EmbryoValue<F>) -> Result<(), Refused> {
        insert(&self.embryos, key, value, usize::MAX)
    }

    fn put_embryo(&self, key: &FlowKey<F>, value: &EmbryoValue<F>) {
        self.embryos.borrow_mut().put(key, *value);
    }

    fn remove(&self, key: &FlowKey<F>) {
        self.flows.borrow_mut().remove(key);
    }

    fn remove_embryo(&self, key: &FlowKey<F>) {
        self.embryos.borrow_mut().remove(key);
    }

    fn count_traffic(&self, service: u32, packets: u32, bytes: u32) {
        let mut traffic = self.traffic.borrow_mut();
        let (all_packets, all_bytes) = traffic.entry(service).or_default();
        *all_packets += u64::from(packets);
        *all_bytes += u64::from(bytes);
    }

    fn next_port(&self, destination: u32) -> u32 {
        let mut turns = self.port_turns.borrow_mut();
        let turn = turns.entry(destination).or_default();
        *turn += 1;
        *turn - 1
    }

    fn exhausted(&self, backend: u32) {
        *self.exhausted.borrow_mut().entry(backend).or_default() += 1;
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

    fn forget_peer(&self, key: &PeerKey<F>) {
        self.peers.borrow_mut().remove(&bytes(key));
    }

    fn remember_peer(&self, key: &PeerKey<F>, value: &PeerValue<F>) {
        self.noted.set(self.noted.get() + 1);
        self.peers.borrow_mut().insert(bytes(key), *value);
    }
}
