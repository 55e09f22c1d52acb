//! The pinned maps, by name and shape, as `proxy_common::tables` lays them out.

use proxy_common::tables::{
    AffinityKey, AffinityValue, Backend, Config, Exit, FlowKey, FlowValue, FragmentKey,
    FragmentValue, Name, PeerKey, PeerValue, ServiceKey, ServiceValue, SourceRange, Work,
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

const fn family<F: Family>(names: [&'static str; 11]) -> [Shape; 11] {
    [
        shape::<ServiceKey<F>, ServiceValue>(names[0]),
        shape::<u32, Backend<F>>(names[1]),
        shape::<FlowKey<F>, FlowValue<F>>(names[2]),
        shape::<FlowKey<F>, FlowValue<F>>(names[3]),
        shape::<FragmentKey<F>, FragmentValue>(names[4]),
        shape::<PeerKey<F>, PeerValue<F>>(names[5]),
        shape::<AffinityKey<F>, AffinityValue>(names[6]),
        shape::<SourceRange<F>, u32>(names[7]),
        shape::<u32, Work<F>>(names[8]),
        shape::<u32, u32>(names[9]),
        shape::<u32, Exit<F>>(names[10]),
    ]
}

const FAMILY_V4: [Shape; 11] = family::<V4>([
    "services_v4",
    "backends_v4",
    "flows_v4",
    "embryos_v4",
    "fragments_v4",
    "peers_v4",
    "affinity_v4",
    "ranges_v4",
    "scratch_v4",
    "loads_v4",
    "exits_v4",
]);
const FAMILY_V6: [Shape; 11] = family::<V6>([
    "services_v6",
    "backends_v6",
    "flows_v6",
    "embryos_v6",
    "fragments_v6",
    "peers_v6",
    "affinity_v6",
    "ranges_v6",
    "scratch_v6",
    "loads_v6",
    "exits_v6",
]);
const COMMON: [Shape; 5] = [
    shape::<u32, Config>("config"),
    shape::<u32, Name>("names"),
    shape::<u32, u64>("outcomes"),
    shape::<u32, u64>("slots"),
    shape::<u32, u32>("turns"),
];

/// All pinned maps.
pub fn shapes() -> impl Iterator<Item = Shape> {
    COMMON.into_iter().chain(FAMILY_V4).chain(FAMILY_V6)
}

/// A family's map, such as `flows_v4`.
pub fn name_of<F: Family>(table: &str) -> String {
    format!("{table}_{}", F::SUFFIX)
}
