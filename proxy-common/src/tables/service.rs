//! Services, slots and backends: from a VIP to the pods behind it.
//!
//! ```text
//! ServiceKey ──services──▶ ServiceValue.cluster ──slots──▶ backend number ──backends──▶ Backend
//! ```
//!
//! A change is one switch: new backends and slots are written first, into free places, then the one
//! hash value is replaced. Old places are used again only after a grace period.

use crate::addr::{Address, Port, mix};
use crate::{Family, map_type, proto};

map_type! {
    /// A frontend: where clients send to. With port 0 and protocol [`proto::ANY`] it says that the
    /// address is a VIP, so that the ports it does not have are refused.
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

    /// The key that marks an address as a VIP.
    #[inline(always)]
    pub const fn vip(vip: F::Addr) -> Self {
        Self::new(vip, Port::new(0), proto::ANY)
    }

    /// What [`ServiceValue::tag`] must be for this key.
    #[inline(always)]
    pub fn tag(&self) -> u32 {
        mix(self.vip.mix(0), u32::from(self.port.word()) << 16 | u32::from(self.proto))
    }
}

/// A run of slots. Eight aligned bytes, so that it is read and replaced as one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(8))]
pub struct Range {
    /// The first slot.
    pub first: u32,
    /// How many slots; 0 if there is no backend.
    pub count: u32,
}

map_type! {
    /// What a frontend leads to.
    pub struct ServiceValue {
        /// [`ServiceKey::tag`] of its own key. The kernel may reuse a deleted hash element while a
        /// program still reads it; a reader that finds another tag has read another Service.
        pub tag: u32,
        /// The Service port's number, the same for all its frontends and over agent restarts.
        pub id: u32,
        /// Backends of the whole cluster.
        pub cluster: Range,
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
        /// [`Backend::SERVING`] or 0, and [`Backend::LOCAL`].
        pub flags: u32,
        /// The Service port's number.
        pub service: u32,
    }
}

impl<F: Family> Backend<F> {
    /// The endpoint may keep the flows it has. Without this flag UDP flows choose anew (KP-109).
    pub const SERVING: u32 = 1;
    /// The endpoint is on this node.
    pub const LOCAL: u32 = 2;
}
