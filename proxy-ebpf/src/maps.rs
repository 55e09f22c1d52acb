//! The maps of each family, and the datapath's [`Tables`] over them and those of [`shared`].
//!
//! Names and layouts are the contract of `proxy_common::tables`; sizes are defaults that the agent
//! may override when it loads the object.

use core::ptr::NonNull;

use aya_ebpf::bindings::{BPF_ANY, BPF_EXIST, BPF_NOEXIST};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage};
use aya_ebpf::macros::btf_map;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::SockAddrContext;
use proxy_common::settings::Settings;
use proxy_common::tables::{
    AffinityKey, AffinityValue, Arrivals, Asked, Backend, EmbryoRecord, EmbryoValue, Exit,
    ExitData, ExitKey, FlowKey, FlowRecord, FlowValue, FragmentKey, FragmentValue, Interest, Kind,
    Kinds, PeerKey, PeerValue, RangeData, ServiceKey, ServiceValue, SourceRange, Spot, Verified,
    Way, Work,
};
use proxy_common::{Family, Outcome, Port, V4, V6};
use proxy_ebpf::datapath::{Refused, Service, Tables};

use crate::counters::{bump, count};
use crate::shared::{self, MAPPED, ON_DEMAND, SERVICES};

const BACKENDS: usize = 327_680;
const WAYS: usize = 16_384;
const FLOWS: usize = 524_288;
const EMBRYOS: usize = 262_144;
const FRAGMENTS: usize = 8_192;
const PEERS: usize = 65_536;
const AFFINITIES: usize = 65_536;
const RANGES: usize = 65_536;
const EXITS: usize = 4_096;
const CLIENTS: usize = 65_536;
const EXHAUSTED: usize = 1_024;

/// What one family needs of the kernel's maps.
macro_rules! tables {
    (
        $tables:ident, $family:ty,
        $services:ident = $services_name:literal, $backends:ident = $backends_name:literal,
        $ways:ident = $ways_name:literal, $interest:ident = $interest_name:literal,
        $loads:ident = $loads_name:literal, $exits:ident = $exits_name:literal,
        $flows:ident = $flows_name:literal, $embryos:ident = $embryos_name:literal,
        $fragments:ident = $fragments_name:literal, $peers:ident = $peers_name:literal,
        $affinity:ident = $affinity_name:literal, $ranges:ident = $ranges_name:literal,
        $asked:ident = $asked_name:literal, $verified:ident = $verified_name:literal,
        $scratch:ident = $scratch_name:literal, $exhausted:ident = $exhausted_name:literal,
        $pods:ident
    ) => {
        #[btf_map(name = $services_name)]
        static $services: HashMap<ServiceKey<$family>, ServiceValue, SERVICES, ON_DEMAND> =
            HashMap::new();
        #[btf_map(name = $backends_name)]
        static $backends: Array<Backend<$family>, BACKENDS, MAPPED> = Array::new();
        #[btf_map(name = $ways_name)]
        static $ways: Array<Way<$family>, WAYS, MAPPED> = Array::new();
        #[btf_map(name = $interest_name)]
        static $interest: Array<Interest, { Interest::COUNT }, MAPPED> = Array::new();
        #[btf_map(name = $loads_name)]
        static $loads: Array<u32, BACKENDS, MAPPED> = Array::new();
        #[btf_map(name = $exits_name)]
        static $exits: LpmTrie<ExitData<$family>, Exit<$family>, EXITS> = LpmTrie::new();
        #[btf_map(name = $flows_name)]
        static $flows: HashMap<FlowKey<$family>, FlowValue<$family>, FLOWS, ON_DEMAND> =
            HashMap::new();
        #[btf_map(name = $embryos_name)]
        static $embryos: LruHashMap<FlowKey<$family>, EmbryoValue<$family>, EMBRYOS> =
            LruHashMap::new();
        #[btf_map(name = $fragments_name)]
        static $fragments: LruHashMap<FragmentKey<$family>, FragmentValue, FRAGMENTS> =
            LruHashMap::new();
        #[btf_map(name = $peers_name)]
        static $peers: LruHashMap<PeerKey<$family>, PeerValue<$family>, PEERS> = LruHashMap::new();
        #[btf_map(name = $affinity_name)]
        static $affinity: LruHashMap<AffinityKey<$family>, AffinityValue, AFFINITIES> =
            LruHashMap::new();
        #[btf_map(name = $ranges_name)]
        static $ranges: LpmTrie<RangeData<$family>, u32, RANGES> = LpmTrie::new();
        #[btf_map(name = $asked_name)]
        static $asked: SkStorage<Asked<$family>> = SkStorage::new();
        #[btf_map(name = $verified_name)]
        static $verified: LruHashMap<FlowKey<$family>, Verified, CLIENTS> = LruHashMap::new();
        #[btf_map(name = $exhausted_name)]
        static $exhausted: HashMap<u32, u64, EXHAUSTED, ON_DEMAND> = HashMap::new();
        #[btf_map(name = $scratch_name)]
        static $scratch: PerCpuArray<Work<$family>, 1> = PerCpuArray::new();

        /// The kernel's maps of one family.
        pub struct $tables;

        impl $tables {
            /// This CPU's work area. Of use at tc only, where programs run with softirqs off and so do
            /// not interrupt each other; socket hooks can be preempted and must not ask for it.
            #[inline(always)]
            pub fn work(&self) -> Option<&'static mut Work<$family>> {
                // SAFETY: the element is this CPU's own, and the hook that asks is the only program
                // that runs on this CPU until it ends.
                $scratch.get_ptr_mut(0).map(|work| unsafe { &mut *work })
            }

            /// What is kept with a socket.
            #[inline(always)]
            pub fn asked(&self, ctx: &SockAddrContext) -> Option<Asked<$family>> {
                // SAFETY: the context has a socket, of which the helper gives what is kept, or null. It is written by the same
                // socket's calls only: one beside another may be shown the VIP of before.
                unsafe { $asked.get_ptr_mut(ctx).as_ref() }.copied()
            }

            /// Keeps it. False if there is no memory for it.
            #[inline(always)]
            pub fn keep(&self, ctx: &SockAddrContext, asked: &Asked<$family>) -> bool {
                // SAFETY: as above.
                match unsafe { $asked.get_or_insert_ptr_mut(ctx, None).as_mut() } {
                    Some(kept) => {
                        *kept = *asked;
                        true
                    }
                    None => false,
                }
            }
        }

        impl Tables<$family> for $tables {
            #[inline(always)]
            fn setting<T: Copy>(&self, field: impl Fn(&Settings) -> &T) -> T {
                shared::setting(field)
            }

            #[inline(always)]
            fn now(&self) -> u32 {
                shared::now()
            }

            #[inline(always)]
            fn microseconds(&self) -> u32 {
                shared::microseconds()
            }

            #[inline(always)]
            fn random(&self) -> u32 {
                shared::random()
            }

            #[inline(always)]
            fn count(&self, outcome: Outcome, times: u32) {
                count(outcome, times);
            }

            #[inline(always)]
            fn service(&self, key: &ServiceKey<$family>) -> Option<Service> {
                let value = $services.get_ptr(key)?;
                // SAFETY: the lookup's pointer stays readable while the program runs. The element may
                // be reused meanwhile, so each field is read once and the tag compared with them.
                let read = unsafe {
                    ServiceValue {
                        id: (&raw const (*value).id).read_volatile(),
                        cluster: (&raw const (*value).cluster).read_volatile(),
                        local: (&raw const (*value).local).read_volatile(),
                        affinity: (&raw const (*value).affinity).read_volatile(),
                        flags: (&raw const (*value).flags).read_volatile(),
                        tag: (&raw const (*value).tag).read_volatile(),
                    }
                };
                let ServiceValue { id, cluster, local, affinity, flags, tag } = read;
                let service = Service { id, cluster, local, affinity, flags };
                (tag == read.tag_of(key)).then_some(service)
            }

            #[inline(always)]
            fn has_service(&self, key: &ServiceKey<$family>) -> bool {
                $services.get_ptr(key).is_some()
            }

            #[inline(always)]
            fn slot(&self, index: u32) -> Option<u32> {
                shared::slot(index)
            }

            #[inline(always)]
            fn backend(&self, number: u32) -> Option<Backend<$family>> {
                $backends.get(number).copied()
            }

            #[inline(always)]
            fn way(&self, number: u32) -> Option<Way<$family>> {
                $ways.get(number).copied()
            }

            #[inline(always)]
            fn interest(&self, address: &<$family as Family>::Addr) -> Kinds {
                let Spot { element, bit } = Spot::of(address);
                $interest.get(element).map_or(Kinds::NONE, |spot| spot.kinds(bit))
            }

            #[inline(always)]
            fn is_server(&self, address: &<$family as Family>::Addr, port: Port) -> bool {
                let Spot { element, bit } = Spot::of_server(address, port);
                $interest
                    .get(element)
                    .is_some_and(|spot| spot.words[Kind::Server as usize] >> bit & 1 != 0)
            }

            #[inline(always)]
            fn take_port(&self, port: Port) {
                shared::take_port(port)
            }

            #[inline(always)]
            fn is_port(&self, port: Port) -> bool {
                shared::is_port(port)
            }

            #[inline(always)]
            fn load(&self, backend: u32) -> u32 {
                $loads.get(backend).copied().unwrap_or_default()
            }

            #[inline(always)]
            fn count_flow(&self, backend: u32, more: bool) {
                if let Some(load) = $loads.get_ptr_mut(backend) {
                    let step = |load: u32| if more { load + 1 } else { load.saturating_sub(1) };
                    bump(load, step);
                }
            }

            #[inline(always)]
            fn turn(&self, service: u32) -> u32 {
                shared::turn(service)
            }

            #[inline(always)]
            fn affinity(&self, key: &AffinityKey<$family>) -> Option<AffinityValue> {
                // SAFETY: copied at once; what a reuse of the element could mix up, the backend's
                // generation and Service tell.
                unsafe { $affinity.get(key).copied() }
            }

            #[inline(always)]
            fn remember_affinity(&self, key: &AffinityKey<$family>, value: &AffinityValue) {
                let _ = $affinity.insert(key, value, u64::from(BPF_ANY));
            }

            #[inline(always)]
            fn is_in_range(&self, key: &SourceRange<$family>) -> bool {
                let key = core::ptr::from_ref(key).cast::<Key<RangeData<$family>>>();
                // SAFETY: a key of the trie is the prefix and the data, in this order and packed, as
                // they lie in a `SourceRange`.
                $ranges.get(unsafe { &*key }).is_some()
            }

            #[inline(always)]
            fn is_pod(&self, address: &<$family as Family>::Addr) -> bool {
                let range = Tables::<$family>::setting(self, |s| &s.$pods);
                is_within(&address.octets, &range.address, &range.mask)
            }

            #[inline(always)]
            fn arrivals(&self) -> Arrivals {
                shared::arrivals()
            }

            #[inline(always)]
            fn count_arrival(&self, now: u32) -> u32 {
                shared::count_arrival(now)
            }

            #[inline(always)]
            fn verified(&self, key: &FlowKey<$family>) -> Option<u32> {
                // SAFETY: copied at once; an element that is reused meanwhile is of one who has shown the same.
                unsafe { $verified.get(key) }.map(|verified| verified.since)
            }

            #[inline(always)]
            fn verify(&self, key: &FlowKey<$family>, now: u32) {
                let _ = $verified.insert(key, &Verified { since: now }, u64::from(BPF_ANY));
            }

            #[inline(always)]
            fn exit(&self, key: &ExitKey<$family>) -> Option<<$family as Family>::Addr> {
                let key = core::ptr::from_ref(key).cast::<Key<ExitData<$family>>>();
                // SAFETY: as for ranges.
                $exits.get(unsafe { &*key }).map(|exit| exit.address)
            }

            #[inline(always)]
            fn flow(&self, key: &FlowKey<$family>) -> Option<FlowRecord<'_, $family>> {
                let value = NonNull::new($flows.get_ptr_mut(key)?)?;
                // SAFETY: a map element stays mapped while the program runs, and the datapath reaches it
                // through records only.
                Some(unsafe { FlowRecord::new(value) })
            }

            #[inline(always)]
            fn embryo(&self, key: &FlowKey<$family>) -> Option<EmbryoRecord<'_, $family>> {
                let value = NonNull::new($embryos.get_ptr_mut(key)?)?;
                // SAFETY: as above.
                Some(unsafe { EmbryoRecord::new(value) })
            }

            #[inline(always)]
            fn insert_flow(
                &self,
                key: &FlowKey<$family>,
                value: &FlowValue<$family>,
            ) -> Result<(), Refused> {
                $flows.insert(key, value, u64::from(BPF_NOEXIST)).map_err(refused)
            }

            #[inline(always)]
            fn replace_flow(&self, key: &FlowKey<$family>, value: &FlowValue<$family>) {
                let _ = $flows.insert(key, value, u64::from(BPF_EXIST));
            }

            #[inline(always)]
            fn wish(&self, key: &FlowKey<$family>) {
                shared::wish(key);
            }

            #[inline(always)]
            fn insert_embryo(
                &self,
                key: &FlowKey<$family>,
                value: &EmbryoValue<$family>,
            ) -> Result<(), Refused> {
                $embryos.insert(key, value, u64::from(BPF_NOEXIST)).map_err(refused)
            }

            #[inline(always)]
            fn put_embryo(&self, key: &FlowKey<$family>, value: &EmbryoValue<$family>) {
                let _ = $embryos.insert(key, value, u64::from(BPF_ANY));
            }

            #[inline(always)]
            fn remove(&self, key: &FlowKey<$family>) {
                let _ = $flows.remove(key);
            }

            #[inline(always)]
            fn remove_embryo(&self, key: &FlowKey<$family>) {
                let _ = $embryos.remove(key);
            }

            #[inline(always)]
            fn count_traffic(&self, service: u32, packets: u32, bytes: u32) {
                shared::count_traffic(service, packets, bytes)
            }

            #[inline(always)]
            fn next_port(&self, destination: u32) -> u32 {
                shared::next_port(destination)
            }

            #[inline(always)]
            fn exhausted(&self, backend: u32) {
                match $exhausted.get_ptr_mut(&backend) {
                    // SAFETY: the element stays mapped while the program runs. A count that races with
                    // another is lost; it is a matter of whether there is one.
                    Some(count) => unsafe { count.write_volatile(count.read_volatile() + 1) },
                    None => {
                        let _ = $exhausted.insert(&backend, &1, u64::from(BPF_NOEXIST));
                    }
                }
            }

            #[inline(always)]
            fn fragment(&self, key: &FragmentKey<$family>) -> Option<FragmentValue> {
                // SAFETY: four bytes that are written once; an element reused meanwhile belongs to a
                // datagram that is lost anyway.
                unsafe { $fragments.get(key).copied() }
            }

            #[inline(always)]
            fn remember_fragment(&self, key: &FragmentKey<$family>, value: FragmentValue) {
                let _ = $fragments.insert(key, value, u64::from(BPF_ANY));
            }

            #[inline(always)]
            fn peer(&self, key: &PeerKey<$family>) -> Option<PeerValue<$family>> {
                // SAFETY: an element is only ever written by its own socket's calls and evicted when it
                // is the oldest of all.
                unsafe { $peers.get(key).copied() }
            }

            #[inline(always)]
            fn forget_peer(&self, key: &PeerKey<$family>) {
                let _ = $peers.remove(key);
            }

            #[inline(always)]
            fn remember_peer(&self, key: &PeerKey<$family>, value: &PeerValue<$family>) {
                let _ = $peers.insert(key, value, u64::from(BPF_ANY));
            }
        }
    };
}

tables!(
    Tables4,
    V4,
    SERVICES_V4 = "services_v4",
    BACKENDS_V4 = "backends_v4",
    WAYS_V4 = "ways_v4",
    INTEREST_V4 = "interest_v4",
    LOADS_V4 = "loads_v4",
    EXITS_V4 = "exits_v4",
    FLOWS_V4 = "flows_v4",
    EMBRYOS_V4 = "embryos_v4",
    FRAGMENTS_V4 = "fragments_v4",
    PEERS_V4 = "peers_v4",
    AFFINITY_V4 = "affinity_v4",
    RANGES_V4 = "ranges_v4",
    ASKED_V4 = "asked_v4",
    VERIFIED_V4 = "verified_v4",
    SCRATCH_V4 = "scratch_v4",
    EXHAUSTED_V4 = "exhausted_v4",
    pods4
);
tables!(
    Tables6,
    V6,
    SERVICES_V6 = "services_v6",
    BACKENDS_V6 = "backends_v6",
    WAYS_V6 = "ways_v6",
    INTEREST_V6 = "interest_v6",
    LOADS_V6 = "loads_v6",
    EXITS_V6 = "exits_v6",
    FLOWS_V6 = "flows_v6",
    EMBRYOS_V6 = "embryos_v6",
    FRAGMENTS_V6 = "fragments_v6",
    PEERS_V6 = "peers_v6",
    AFFINITY_V6 = "affinity_v6",
    RANGES_V6 = "ranges_v6",
    ASKED_V6 = "asked_v6",
    VERIFIED_V6 = "verified_v6",
    SCRATCH_V6 = "scratch_v6",
    EXHAUSTED_V6 = "exhausted_v6",
    pods6
);

/// Whether an address is in a range; none is in one without a mask.
#[inline(always)]
fn is_within<const N: usize>(address: &[u8; N], range: &[u8; N], mask: &[u8; N]) -> bool {
    let mut outside = 0;
    let mut any = 0;
    for position in 0..N {
        outside |= (address[position] ^ range[position]) & mask[position];
        any |= mask[position];
    }
    outside == 0 && any != 0
}

#[inline(always)]
fn refused(errno: i32) -> Refused {
    const EEXIST: i32 = -17;
    if errno == EEXIST { Refused::Exists } else { Refused::Full }
}
