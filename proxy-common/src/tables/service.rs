//! Services, slots and backends: from a VIP to the pods behind it.
//!
//! ```text
//! ServiceKey ──services──▶ ServiceValue.cluster ──slots: table──▶ position
//!                                               ──slots: members──▶ backend number ──backends──▶ Backend
//! ```
//!
//! Two runs of slots: a *table* says which position a number stands for (Maglev's, or each position as often
//! as its weight says), the *members* which backend is at each position. Service ports with equal endpoints
//! share a table, also where their target ports differ. Where each member counts once and in its order,
//! there is no table: the number stands for the member.
//!
//! A `NodePort` is a frontend at the zero address; the marks of the node's own addresses lead there.
//!
//! A change is one switch: new backends and slots are written first, into free places, then the one
//! hash value is replaced. Old places are used again only after a grace period.

use crate::addr::{Address, Port, mix};
use crate::{Family, map_type, proto};

map_type! {
    /// A frontend: where clients send to. With port 0 and protocol [`proto::ANY`] it is the mark of an
    /// address: its value's flags say what the address is.
    pub struct ServiceKey<F> {
        /// The virtual IP.
        pub vip: F::Addr,
        /// The Service's port.
        pub port: Port,
        /// The transport protocol.
        pub proto: u8,
        /// Zero.
        pub pad: u8,
    }
}

impl<F: Family> ServiceKey<F> {
    /// The key of one port of a VIP.
    #[inline(always)]
    pub const fn new(vip: F::Addr, port: Port, proto: u8) -> Self {
        Self { vip, port, proto, pad: 0 }
    }

    /// The key of an address's mark.
    #[inline(always)]
    pub const fn mark(address: F::Addr) -> Self {
        Self::new(address, Port::new(0), proto::ANY)
    }

    /// The key of a `NodePort`.
    #[inline(always)]
    pub fn node_port(port: Port, proto: u8) -> Self {
        Self::new(bytemuck::Zeroable::zeroed(), port, proto)
    }
}

/// A run of slots.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    bytemuck::Pod,
    bytemuck::Zeroable,
)]
#[repr(C, align(8))]
pub struct Range {
    /// The first slot.
    pub first: u32,
    /// How many slots.
    pub count: u32,
}

impl Range {
    /// The first slot of a table that there is none of.
    pub const NO_TABLE: u32 = u32::MAX;
}

/// Backends that a new flow's is chosen from.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    Default,
    bytemuck::Pod,
    bytemuck::Zeroable,
)]
#[repr(C, align(4))]
pub struct Choice {
    /// The first slot of the table of positions; [`Range::NO_TABLE`] if the number stands for the member.
    pub table: u32,
    /// How long the table is, or how many members there are; 0 if there is no backend.
    pub count: u32,
    /// The first slot of the members.
    pub members: u32,
}

map_type! {
    /// What a frontend leads to. 40 bytes: with an IPv4 key and the kernel's header 96, two lines.
    pub struct ServiceValue {
        /// [`ServiceValue::tag_of`] its own key and all that follows. The kernel may reuse a deleted hash
        /// element while a program still reads it; a reader that finds another tag has read another Service.
        pub tag: u32,
        /// The Service port's number, the same for all its frontends and over agent restarts.
        pub id: u32,
        /// Backends of the whole cluster.
        pub cluster: Choice,
        /// Backends on this node.
        pub local: Choice,
        /// For how many ticks a client stays with its backend; 0 if it does not (KP-95).
        pub affinity: u32,
        /// [`ServiceValue::REFUSES`] and its like.
        pub flags: u32,
    }
}

impl ServiceValue {
    /// Mark: the address is a `ClusterIP`, whose unused ports are refused (KP-40).
    pub const REFUSES: u32 = 1;
    /// Mark: the address takes `NodePorts`.
    pub const NODE_PORTS: u32 = 2;
    /// Mark: the address is this node's, so answers to it may belong to masqueraded flows.
    pub const NODE: u32 = 4;
    /// Frontend: only backends on this node, whoever asks (internalTrafficPolicy, KP-59).
    pub const LOCAL_FOR_ALL: u32 = 8;
    /// Frontend: only backends on this node for who asks from outside (externalTrafficPolicy, KP-52).
    pub const LOCAL_FOR_OUTSIDE: u32 = 16;
    /// Frontend: only for clients in the Service's source ranges (KP-90).
    pub const SOURCE_RANGES: u32 = 32;
    /// Frontend: with source ranges that this node's own address is in (KP-92).
    pub const NODE_ALLOWED: u32 = 64;
    /// Frontend: a pod's host port. At the zero address it is for all of the node's own addresses, also
    /// those that take no `NodePorts`; at another one it counts only if that is the node's own.
    pub const HOST_PORT: u32 = 128;
    /// Mark: the node's loopback, which only its own sockets can mean.
    pub const LOOPBACK: u32 = 256;
    /// Frontend: the flags from this bit on are its [`Algorithm`] as a number.
    pub const ALGORITHM_SHIFT: u32 = 24;

    /// What vouches for a value: a hash of its key and all its fields but the tag.
    #[inline(always)]
    pub fn tag_of<F: Family>(&self, key: &ServiceKey<F>) -> u32 {
        let Choice { table, count, members } = self.cluster;
        let hash = mix(key.vip.mix(0), u32::from(key.port.word()) << 16 | u32::from(key.proto));
        let hash = mix(mix(mix(mix(hash, self.id), table), count), members);
        let Choice { table, count, members } = self.local;
        mix(mix(mix(mix(mix(hash, table), count), members), self.affinity), self.flags)
    }
}

/// How a new flow's backend is chosen among a frontend's slots.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(u32)]
pub enum Algorithm {
    /// By a hash of addresses and ports, the same on all nodes, in Maglev's table: the same flow finds
    /// the same backend again, and few flows another one when backends change.
    #[default]
    Maglev = 0,
    /// At random.
    Random = 1,
    /// By a hash of the client's address, in Maglev's table: a client stays with its backend.
    SourceHash = 2,
    /// One after the other.
    RoundRobin = 3,
    /// Of two at random the one with fewer flows.
    LeastConn = 4,
}

impl Algorithm {
    /// All algorithms, in the order of their numbers.
    pub const ALL: [Self; 5] =
        [Self::Maglev, Self::Random, Self::SourceHash, Self::RoundRobin, Self::LeastConn];

    /// The algorithm's name, for flags and annotations.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Maglev => "maglev",
            Self::Random => "random",
            Self::SourceHash => "source-hash",
            Self::RoundRobin => "round-robin",
            Self::LeastConn => "least-conn",
        }
    }

    /// The algorithm as flags of a [`ServiceValue`].
    #[inline(always)]
    pub const fn flags(self) -> u32 {
        (self as u32) << ServiceValue::ALGORITHM_SHIFT
    }

    /// Whether the flags of a [`ServiceValue`] say so.
    #[inline(always)]
    pub const fn is_in(self, flags: u32) -> bool {
        flags >> ServiceValue::ALGORITHM_SHIFT == self as u32
    }
}

map_type! {
    /// Two slots next to each other: elements of arrays are eight bytes apart at least.
    pub struct Slots {
        /// The slot with an even number, then the one behind it.
        pub numbers: [u32; 2],
    }
}

map_type! {
    /// An endpoint of one Service port. A pod that backs two Service ports has two numbers, so that
    /// each can be withdrawn alone.
    pub struct Backend<F> {
        /// The endpoint's address.
        pub addr: F::Addr,
        /// The endpoint's port.
        pub port: Port,
        /// Raised when the number is given to another endpoint; flows remember it.
        pub generation: u16,
        /// [`Backend::SERVING`] and its like.
        pub flags: u32,
        /// The Service port's number.
        pub service: u32,
        /// The number of the [`Way`] that leads there; 0 if none is known. What is known of a way is read
        /// behind one number, so that a flow never begins with half of one way and half of another.
        pub way: u32,
        /// Its share of new flows, beside those of others (least-conn divides by it).
        pub weight: u16,
        /// Zero.
        pub pad: u16,
    }
}

map_type! {
    /// A way from this node to endpoints. It is not written again while a backend has its number.
    pub struct Way<F> {
        /// The address that the node's own packets have there: what masqueraded flows come from.
        pub source: F::Addr,
        /// The link that it begins with. 0: there is no way.
        pub link: u32,
        /// The longest IP packet that passes; 0 if it is not known.
        pub mtu: u16,
        /// Zero.
        pub pad: u16,
        /// The gateway that packets are handed to there. Zeros: the kernel is asked for it.
        pub hop: F::Addr,
    }
}

impl<F: Family> Backend<F> {
    /// The endpoint may keep the flows it has. Without this flag UDP flows choose anew (KP-109).
    pub const SERVING: u32 = 1;
    /// The endpoint is on this node.
    pub const LOCAL: u32 = 2;
    /// The endpoint takes new flows of the cluster's range.
    pub const IN_CLUSTER: u32 = 4;
    /// The endpoint takes new flows of the local range.
    pub const IN_LOCAL: u32 = 8;
    /// Its flows are counted: it is one of those that least-conn chooses from.
    pub const COUNTED: u32 = 16;
}

map_type! {
    /// A client that stays with its backend (KP-95): by address, and not by port; of one Service port,
    /// over all its frontends.
    pub struct AffinityKey<F> {
        /// The client's address; zero for sockets, which have none when they choose.
        pub client: F::Addr,
        /// The Service port's number.
        pub service: u32,
        /// The cookie of the client's network namespace in two halves, for sockets; zero otherwise.
        pub netns: [u32; 2],
    }
}

map_type! {
    /// The backend that a client stays with.
    pub struct AffinityValue {
        /// The backend's number.
        pub backend: u32,
        /// When a flow last chose it, in ticks.
        pub seen: u32,
        /// The backend's generation then.
        pub generation: u16,
        /// Zero.
        pub pad: u16,
    }
}

map_type! {
    /// A range of a Service port's source ranges: what the trie's prefix counts the bits of.
    pub struct RangeData<F> {
        /// The Service port's number, in network byte order: it is matched bit by bit. 0: the ranges that
        /// pods are not masqueraded for.
        pub service: [u8; 4],
        /// The range's address.
        pub address: F::Addr,
    }
}

impl<F: Family> RangeData<F> {
    /// The bits of the number, which every prefix counts.
    pub const SERVICE_BITS: u32 = 32;
}

map_type! {
    /// A key of the source ranges, laid out as the kernel's tries have it.
    pub struct SourceRange<F> {
        /// How many bits of what follows count.
        pub prefix: u32,
        /// What follows.
        pub data: RangeData<F>,
    }
}
