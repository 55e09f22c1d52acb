//! The pinned maps, by name and shape, as `proxy_common::tables` lays them out.

use proxy_common::tables::{
    AffinityKey, AffinityValue, Arrivals, Asked, Backend, Config, EmbryoValue, Exit, ExitKey,
    FlowKey, FlowValue, FragmentKey, FragmentValue, Interest, Name, PeerKey, PeerValue, Ports,
    ServiceKey, ServiceValue, Slots, SourceRange, Traffic, Verified, Way, Work,
};
use proxy_common::{Family, V4, V6};

/// A map's name and the sizes of its keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// The map's name: in the object, in listings and under the bpffs root.
    pub name: &'static str,
    /// The size of a key in bytes.
    pub key: usize,
    /// The size of a value in bytes.
    pub value: usize,
}

const fn shape<K, V>(name: &'static str) -> Shape {
    Shape { name, key: size_of::<K>(), value: size_of::<V>() }
}

macro_rules! family {
    ($family:ty, $suffix:literal) => {
        [
            shape::<ServiceKey<$family>, ServiceValue>(concat!("services_", $suffix)),
            shape::<u32, Backend<$family>>(concat!("backends_", $suffix)),
            shape::<u32, Way<$family>>(concat!("ways_", $suffix)),
            shape::<u32, Interest>(concat!("interest_", $suffix)),
            shape::<FlowKey<$family>, FlowValue<$family>>(concat!("flows_", $suffix)),
            shape::<FlowKey<$family>, EmbryoValue<$family>>(concat!("embryos_", $suffix)),
            shape::<FragmentKey<$family>, FragmentValue>(concat!("fragments_", $suffix)),
            shape::<PeerKey<$family>, PeerValue<$family>>(concat!("peers_", $suffix)),
            shape::<u32, Asked<$family>>(concat!("asked_", $suffix)),
            shape::<AffinityKey<$family>, AffinityValue>(concat!("affinity_", $suffix)),
            shape::<SourceRange<$family>, u32>(concat!("ranges_", $suffix)),
            shape::<u32, Work<$family>>(concat!("scratch_", $suffix)),
            shape::<u32, u32>(concat!("loads_", $suffix)),
            shape::<ExitKey<$family>, Exit<$family>>(concat!("exits_", $suffix)),
            shape::<u32, u64>(concat!("exhausted_", $suffix)),
            shape::<FlowKey<$family>, Verified>(concat!("verified_", $suffix)),
        ]
    };
}

const COMMON: [Shape; 12] = [
    shape::<u32, Config>("config"),
    shape::<u32, Name>("names"),
    shape::<u32, u64>("outcomes"),
    shape::<u32, u64>("outcomes_swept"),
    shape::<u32, Slots>("slots"),
    shape::<u32, u32>("turns"),
    shape::<u32, u32>("port_turns"),
    shape::<u32, Ports>("ports"),
    shape::<u32, Traffic>("traffic"),
    shape::<u32, u32>("relays"),
    shape::<u32, Arrivals>("arrivals"),
    // A ring buffer has neither.
    shape::<(), ()>("wishes"),
];

/// All pinned maps.
pub fn shapes() -> impl Iterator<Item = Shape> {
    COMMON.into_iter().chain(family!(V4, "v4")).chain(family!(V6, "v6"))
}

/// A family's map, such as `flows_v4`.
pub fn name_of<F: Family>(table: &str) -> String {
    format!("{table}_{}", F::SUFFIX)
}
