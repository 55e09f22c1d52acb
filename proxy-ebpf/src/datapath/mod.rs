//! What is decided about a packet. Two stories and their steps:
//!
//! - [`ingress`]: from a client toward a backend. parse → flow → service → open (which chooses) →
//!   rewrite.
//! - [`egress`]: from a backend back to a client. parse → flow → promote → rewrite. And from a pod out of
//!   the cluster, if that is to be masqueraded: [`leave`].
//! - [`socket`]: the same decision at connect and sendmsg, before there is a packet.
//!
//! Steps: [`flow`] (an existing flow wins), [`choose`] and [`open`] (otherwise one is recorded), [`rewrite`] (the only
//! code that changes a packet that goes on), [`icmp`] (errors about flows), [`refuse`] (answers to
//! what no backend serves).

pub mod choose;
pub mod flow;
pub mod icmp;
pub mod leave;
pub mod open;
pub mod refuse;
pub mod rewrite;
pub mod socket;
mod story;

use proxy_common::settings::Settings;
use proxy_common::tables::{
    AffinityKey, AffinityValue, Algorithm, Backend, FlowKey, FlowRecord, FlowValue, FragmentKey,
    FragmentValue, PeerKey, PeerValue, Range, ServiceKey, ServiceValue, SourceRange,
};
use proxy_common::{Family, Outcome};

pub use story::{egress, ingress};

/// A frontend or a mark, as the datapath needs it.
#[derive(Clone, Copy)]
pub struct Service {
    /// The Service port's number.
    pub id: u32,
    /// Backends of the whole cluster.
    pub cluster: Range,
    /// Backends on this node.
    pub local: Range,
    /// For how many ticks a client stays with its backend; 0 if it does not.
    pub affinity: u32,
    /// The flags of [`proxy_common::tables::ServiceValue`].
    pub flags: u32,
}

impl Service {
    /// Whether one of these flags is set.
    #[inline(always)]
    pub const fn has(&self, flags: u32) -> bool {
        self.flags & flags != 0
    }

    /// The same, but for algorithms that choose another backend each time.
    #[inline(always)]
    #[must_use]
    pub const fn steady(self) -> Self {
        if self.chooses(Algorithm::RoundRobin) || self.chooses(Algorithm::LeastConn) {
            let others = (1 << ServiceValue::ALGORITHM_SHIFT) - 1;
            return Self { flags: self.flags & others | Algorithm::Maglev.flags(), ..self };
        }
        self
    }

    /// Whether that is how it chooses a backend.
    #[inline(always)]
    pub const fn chooses(&self, by: Algorithm) -> bool {
        by.is_in(self.flags)
    }
}

/// Whose packets come in at a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Client {
    /// A pod's of this node: its answers come back by this link.
    Pod,
    /// Those of anyone outside the node. To reach a backend elsewhere they are masqueraded, so that the
    /// answers come back to this node.
    Outside,
}

/// Why a record could not be inserted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// There is one under that key already.
    Exists,
    /// The table is full.
    Full,
}

/// The maps, as the datapath sees them: eBPF maps in the kernel, ordinary collections in tests.
///
/// All methods take `&self`: maps are shared memory, other CPUs change them at any time.
pub trait Tables<F: Family> {
    /// One of the read-only settings: `field` picks it. Field by field, because in the kernel each
    /// read is a load that the compiler may not repeat, move or drop.
    fn setting<T: Copy>(&self, field: impl Fn(&Settings) -> &T) -> T;
    /// The time in ticks of [`proxy_common::settings::TICK_SHIFT`].
    fn now(&self) -> u32;
    /// A random number.
    fn random(&self) -> u32;
    /// Counts an outcome.
    fn count(&self, outcome: Outcome);

    /// A frontend's Service port, or an address's mark.
    fn service(&self, key: &ServiceKey<F>) -> Option<Service>;
    /// The backend number in a slot.
    fn slot(&self, index: u32) -> Option<u32>;
    /// A backend.
    fn backend(&self, number: u32) -> Option<Backend<F>>;

    /// How many flows a backend has, as far as they are counted.
    fn load(&self, backend: u32) -> u32;
    /// Counts a flow more or less of a backend.
    fn count_flow(&self, backend: u32, more: bool);
    /// How many flows a Service port has chosen backends for in turn; counts one more.
    fn turn(&self, service: u32) -> u32;

    /// The backend that a client stays with.
    fn affinity(&self, key: &AffinityKey<F>) -> Option<AffinityValue>;
    /// Keeps the backend that a client stays with.
    fn remember_affinity(&self, key: &AffinityKey<F>, value: &AffinityValue);
    /// Whether a client is in one of a Service's source ranges.
    fn is_in_range(&self, key: &SourceRange<F>) -> bool;
    /// Whether an address is in the pods' range.
    fn is_pod(&self, address: &F::Addr) -> bool;
    /// The node's address that pods leave the cluster by on a link.
    fn exit(&self, link: u32) -> Option<F::Addr>;

    /// The record of an answered flow.
    fn flow(&self, key: &FlowKey<F>) -> Option<FlowRecord<'_, F>>;
    /// The record of a flow that is not answered yet.
    fn embryo(&self, key: &FlowKey<F>) -> Option<FlowRecord<'_, F>>;
    /// Inserts the record of an answered flow, if there is none.
    ///
    /// # Errors
    /// Says why not.
    fn insert_flow(&self, key: &FlowKey<F>, value: &FlowValue<F>) -> Result<(), Refused>;
    /// Inserts the record of a flow that is not answered yet, if there is none.
    ///
    /// # Errors
    /// Says why not.
    fn insert_embryo(&self, key: &FlowKey<F>, value: &FlowValue<F>) -> Result<(), Refused>;
    /// Removes a record from the table of answered flows.
    fn remove(&self, key: &FlowKey<F>);
    /// Removes a record from the table of flows not answered yet.
    fn remove_embryo(&self, key: &FlowKey<F>);
    /// The ports of a datagram whose first fragment was seen.
    fn fragment(&self, key: &FragmentKey<F>) -> Option<FragmentValue>;
    /// Keeps the ports of a datagram for its later fragments.
    fn remember_fragment(&self, key: &FragmentKey<F>, value: FragmentValue);

    /// The frontend that a socket asked for.
    fn peer(&self, key: &PeerKey<F>) -> Option<PeerValue<F>>;
    /// Keeps the frontend that a socket asked for.
    fn remember_peer(&self, key: &PeerKey<F>, value: &PeerValue<F>);
}
