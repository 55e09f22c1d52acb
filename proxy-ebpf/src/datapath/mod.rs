//! What is decided about a packet.
//!
//! - [`fast`]: every packet. Left alone if it is nobody's, which mostly some bits tell ([`interest`]); translated after one
//!   look-up if it is a plain packet in the middle of a live flow; otherwise it is one of the stories':
//! - [`story::ingress`]: from a client toward a backend. parse → flow → service → choose → place →
//!   rewrite.
//! - [`story::egress`]: from a backend back to a client. parse → flow → rewrite. And what is to be masqueraded where it
//!   leaves: [`leave`].
//! - [`catch`]: what goes to a VIP and leaves untranslated.
//! - [`relay`]: before the host stack, what takes a short cut; and [`guard`], what is not let in.
//! - [`direct`]: who asks an endpoint by its own address.
//! - [`icmp`] (errors about flows, and pings) and [`refuse`] (answers to what no backend serves).
//! - [`socket`]: the same decision at connect and sendmsg, before there is a packet.
//!
//! Steps: [`live`] and [`pending`] with [`promote`] (a flow that is known wins), [`choose`], [`place`] and [`open`]
//! (otherwise one is recorded), [`rewrite`] (the only code that changes a packet that goes on).

pub mod catch;
pub mod choose;
pub mod direct;
pub mod fast;
pub mod guard;
pub mod icmp;
pub mod interest;
pub mod leave;
pub mod live;
pub mod open;
pub mod pending;
pub mod place;
pub mod promote;
pub mod refuse;
pub mod relay;
pub mod rewrite;
pub mod socket;
pub mod story;

use proxy_common::settings::Settings;
use proxy_common::tables::{
    AffinityKey, AffinityValue, Algorithm, Arrivals, Backend, Choice, EmbryoRecord, EmbryoValue,
    ExitKey, FlowKey, FlowRecord, FlowValue, FragmentKey, FragmentValue, Kinds, PeerKey, PeerValue,
    ServiceKey, ServiceValue, Side, SourceRange, Way, Work,
};
use proxy_common::{Family, Outcome, Port};

use crate::packet::{Frame, Wire};

/// A frontend or a mark, as the datapath needs it.
#[derive(Clone, Copy)]
pub struct Service {
    /// The Service port's number.
    pub id: u32,
    /// Backends of the whole cluster.
    pub cluster: Choice,
    /// Backends on this node.
    pub local: Choice,
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

    /// Whether it is a `ClusterIP`'s, and the address's mark says that the node has it too: then it may have a server of its
    /// own there, as `NodeLocal DNSCache` is.
    #[inline(always)]
    pub const fn may_be_nodes(&self, mark: &Self) -> bool {
        mark.has(ServiceValue::NODE) && self.has(ServiceValue::REFUSES)
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

/// Whether an address is the node's own.
#[inline(always)]
fn is_nodes<F: Family, T: Tables<F>>(tables: &T, address: F::Addr) -> bool {
    let mark = tables.service(&ServiceKey::mark(address));
    mark.is_some_and(|mark| mark.has(ServiceValue::NODE))
}

/// Whose packets come in at a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Client {
    /// A pod's of this node: its answers come back by this link.
    Pod,
    /// Those of anyone outside the node. To reach a backend elsewhere they are masqueraded where they leave again, so that
    /// the answers come back to this node.
    Outside,
}

impl Client {
    /// The story of its packets.
    #[inline(always)]
    const fn story(self) -> Story {
        match self {
            Self::Pod => Story::FromPod,
            Self::Outside => Story::FromOutside,
        }
    }
}

/// A step in the story of a packet that is none of a live flow's plain ones. In the kernel each is a
/// program of its own, which the verifier looks at alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Story {
    /// It came in by a pod's link: [`story::ingress`].
    FromPod = 0,
    /// It came in by an uplink: [`story::ingress`].
    FromOutside = 1,
    /// It goes out to a client: [`story::egress`].
    ToClient = 2,
    /// It belongs to no live flow: [`story::pending`].
    Pending = 3,
    /// It begins a flow at ingress: [`story::arrive`].
    Arrive = 4,
    /// It begins a flow at egress: [`story::leave`].
    Leave = 5,
    /// Its flow asks for a place: [`story::settle`].
    Settle = 6,
    /// It is translated and goes on: [`story::send`].
    Send = 7,
    /// [`refuse::refuse`].
    Refuse = 8,
    /// [`icmp::tell`].
    Icmp = 9,
}

impl Story {
    /// How many there are.
    pub const COUNT: usize = 10;
}

/// What is done with a packet, and by which link it leaves if it is sent on past the host stack; or comes in, if it goes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// What is done.
    pub outcome: Outcome,
    /// The link that it leaves by; 0 if that is the stack's to say.
    pub link: u32,
    /// The number of the way that says to which gateway it is handed; 0 if the kernel is to be asked.
    pub way: u32,
}

impl Verdict {
    /// That, and by the stack.
    #[inline(always)]
    pub const fn of(outcome: Outcome) -> Self {
        Self { outcome, link: 0, way: 0 }
    }

    /// That; where the packet goes back to who has sent it, and was about to leave the node, by the link that it comes in by again.
    #[inline(always)]
    fn back<F: Family, T: Tables<F>>(tables: &T, key: &FlowKey<F>, outcome: Outcome) -> Self {
        if !outcome.turns_back() || key.side != Side::Egress as u8 {
            return Self::of(outcome);
        }
        let outcome = if outcome == Outcome::Hairpin { Outcome::Caught } else { outcome };
        Self { outcome, link: tables.setting(|s| &s.catch_all), way: 0 }
    }
}

/// How a packet leaves that is sent on past the host stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leg {
    /// The link; 0 if nothing leads there.
    pub link: u32,
    /// The longest IP packet that passes; 0 if it is not known.
    pub mtu: u32,
    /// See [`Verdict::way`].
    pub way: u32,
}

impl Leg {
    /// None.
    pub const NONE: Self = Self { link: 0, mtu: 0, way: 0 };
}

/// What comes of a packet, or who is to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// That is it.
    Done(Verdict),
    /// That is it, and the flow's record has counted it.
    Counted(Verdict),
    /// Another story goes on with it.
    Story(Story),
}

impl From<Outcome> for Next {
    #[inline(always)]
    fn from(outcome: Outcome) -> Self {
        Self::Done(Verdict::of(outcome))
    }
}

/// Why a record could not be inserted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// There is one under that key already.
    Exists,
    /// The table is full, or there is no memory.
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
    /// The time in microseconds; wraps.
    fn microseconds(&self) -> u32;
    /// A random number.
    fn random(&self) -> u32;
    /// Counts an outcome.
    fn count(&self, outcome: Outcome, times: u32);

    /// A frontend's Service port, or an address's mark.
    fn service(&self, key: &ServiceKey<F>) -> Option<Service>;
    /// Whether there may be a frontend under that key; its value is not looked at.
    fn has_service(&self, key: &ServiceKey<F>) -> bool;
    /// What is in a slot: a position or a backend's number.
    fn slot(&self, index: u32) -> Option<u32>;
    /// A backend.
    fn backend(&self, number: u32) -> Option<Backend<F>>;
    /// What an address may be.
    fn interest(&self, address: &F::Addr) -> Kinds;
    /// Whether an endpoint may serve at an address and port.
    fn is_server(&self, address: &F::Addr, port: Port) -> bool;
    /// Notes that a flow has a port of the node's, to which its answers come in; or one of a client's that asks an endpoint by
    /// its own address and is given another.
    fn take_port(&self, port: Port);
    /// Whether a port of the node's is, or has been, one to which answers come in, a `NodePort` or a host port.
    fn is_port(&self, port: Port) -> bool;
    /// A way to backends.
    fn way(&self, number: u32) -> Option<Way<F>>;

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
    /// How many TCP flows have begun, as this CPU has seen them before the host stack.
    fn arrivals(&self) -> Arrivals;
    /// Counts one more. How many there are in this tick then.
    fn count_arrival(&self, now: u32) -> u32;
    /// When the client of a connection has answered a challenge.
    fn verified(&self, key: &FlowKey<F>) -> Option<u32>;
    /// Notes that he has.
    fn verify(&self, key: &FlowKey<F>, now: u32);
    /// The node's address that takes the place of another one's which leaves by a link.
    fn exit(&self, key: &ExitKey<F>) -> Option<F::Addr>;

    /// The record of a live flow.
    fn flow(&self, key: &FlowKey<F>) -> Option<FlowRecord<'_, F>>;
    /// The record of a flow that is not live.
    fn embryo(&self, key: &FlowKey<F>) -> Option<EmbryoRecord<'_, F>>;
    /// Inserts the record of a live flow, if there is none.
    ///
    /// # Errors
    /// Says why not.
    fn insert_flow(&self, key: &FlowKey<F>, value: &FlowValue<F>) -> Result<(), Refused>;
    /// Replaces the record of a live flow, if there is one.
    fn replace_flow(&self, key: &FlowKey<F>, value: &FlowValue<F>);
    /// Asks the agent for a short cut, for a client's packets that are masqueraded.
    fn wish(&self, key: &FlowKey<F>);
    /// Inserts the record of a flow that is not live, if there is none.
    ///
    /// # Errors
    /// Says why not.
    fn insert_embryo(&self, key: &FlowKey<F>, value: &EmbryoValue<F>) -> Result<(), Refused>;
    /// Puts the record of a flow that is not live in the place of any other.
    fn put_embryo(&self, key: &FlowKey<F>, value: &EmbryoValue<F>);
    /// Removes a record from the table of live flows.
    fn remove(&self, key: &FlowKey<F>);
    /// Removes a record from the table of flows that are not live.
    fn remove_embryo(&self, key: &FlowKey<F>);
    /// Adds to what was counted of a Service port's traffic.
    fn count_traffic(&self, service: u32, packets: u32, bytes: u32);
    /// The turn among source ports toward a destination, known by a hash; counts one more.
    fn next_port(&self, destination: u32) -> u32;
    /// Counts a flow that got no source port to a backend.
    fn exhausted(&self, backend: u32);
    /// The ports of a datagram whose first fragment was seen.
    fn fragment(&self, key: &FragmentKey<F>) -> Option<FragmentValue>;
    /// Keeps the ports of a datagram for its later fragments.
    fn remember_fragment(&self, key: &FragmentKey<F>, value: FragmentValue);

    /// The frontend that a socket asked for.
    fn peer(&self, key: &PeerKey<F>) -> Option<PeerValue<F>>;
    /// Forgets the frontend that a socket asked for.
    fn forget_peer(&self, key: &PeerKey<F>);
    /// Keeps the frontend that a socket asked for.
    fn remember_peer(&self, key: &PeerKey<F>, value: &PeerValue<F>);
}

/// Goes on with the story of a packet.
#[inline(always)]
pub fn tell<F: Wire, P: Frame, T: Tables<F>>(
    story: Story,
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
) -> Next {
    match story {
        Story::FromPod | Story::FromOutside => story::ingress(frame, tables, work, story),
        Story::ToClient => story::egress(frame, tables, work),
        Story::Pending => story::pending(frame, tables, work),
        Story::Arrive => story::arrive(frame, tables, work),
        Story::Leave => story::leave(frame, tables, work),
        Story::Settle => story::settle(frame, tables, work),
        Story::Send => story::send(frame, tables, work),
        Story::Refuse => Next::Done(Verdict::back(tables, &work.key, refuse::refuse(frame, work))),
        Story::Icmp => {
            let outcome = icmp::tell(frame, tables, work);
            Next::Done(Verdict::back(tables, &work.key, outcome))
        }
    }
}
