//! What is decided about a packet. Two stories and their steps:
//!
//! - [`ingress`]: from a client toward a backend. parse → flow → service → open → rewrite.
//! - [`egress`]: from a backend back to a client. parse → flow → promote → rewrite.
//! - [`socket`]: the same decision at connect and sendmsg, before there is a packet.
//!
//! Steps: [`flow`] (an existing flow wins), [`open`] (otherwise one is recorded), [`rewrite`] (the only
//! code that changes a packet that goes on), [`icmp`] (errors about flows), [`refuse`] (answers to
//! what no backend serves).

pub mod flow;
pub mod icmp;
pub mod open;
pub mod refuse;
pub mod rewrite;
pub mod socket;
mod story;

use proxy_common::settings::Settings;
use proxy_common::tables::{
    Backend, FlowKey, FlowRecord, FlowValue, FragmentKey, FragmentValue, PeerKey, PeerValue, Range,
    ServiceKey,
};
use proxy_common::{Family, Outcome};

pub use story::{egress, ingress};

/// A Service port, as the datapath needs it.
#[derive(Clone, Copy)]
pub struct Service {
    /// The Service port's number.
    pub id: u32,
    /// Its backends.
    pub range: Range,
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
    /// Counts an outcome.
    fn count(&self, outcome: Outcome);

    /// The Service port at a frontend.
    fn service(&self, key: &ServiceKey<F>) -> Option<Service>;
    /// The backend number in a slot.
    fn slot(&self, index: u32) -> Option<u32>;
    /// A backend.
    fn backend(&self, number: u32) -> Option<Backend<F>>;

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
    /// Removes a record from both tables of flows.
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
