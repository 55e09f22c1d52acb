//! What the datapath works on while it has a packet.

use super::flow::{EmbryoValue, FlowKey, FlowValue, Origin};
use super::service::{AffinityKey, SourceRange};
use crate::addr::Port;
use crate::{Outcome, map_type};

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Part {
    /// All of it.
    Whole = 0,
    /// The first fragment, which has the transport header.
    First = 1,
    /// A later fragment, which has none.
    Later = 2,
}

map_type! {
    /// What a packet's headers say beside the addresses.
    pub struct Packet {
        /// Where the transport header begins, from the start of the frame.
        pub l4: u32,
        /// The datagram's identification as it lies in memory, if this is a fragment.
        pub id: u32,
        /// The transport protocol, extension headers passed over.
        pub proto: u8,
        /// TCP's flags; 0 otherwise.
        pub flags: u8,
        /// The [`Part`] as a number.
        pub part: u8,
        /// Zero.
        pub pad: u8,
    }
}

impl Packet {
    /// Whether the packet is that part of a datagram.
    #[inline(always)]
    pub const fn is(&self, part: Part) -> bool {
        self.part == part as u8
    }

    /// Where the transport header begins, from the start of the frame.
    #[inline(always)]
    pub const fn l4(&self) -> usize {
        self.l4 as usize
    }
}

map_type! {
    /// Of the source ports that are held, the one that is given away first: one whose flow ended longest ago; if
    /// there is none, one whose client has not shown for longest that it hears the backend.
    pub struct LastResort {
        /// Since when that is so, in ticks.
        pub since: u32,
        /// The port's number; 0 if there is none. With [`LastResort::ENDED`] if its flow has ended.
        pub port: u32,
    }
}

impl LastResort {
    /// The flow of the port has ended.
    pub const ENDED: u32 = 1 << 16;

    /// Keeps a port if it is the better one.
    #[inline(always)]
    pub fn consider(&mut self, since: u32, port: Port, has_ended: bool) {
        let kind = if has_ended { Self::ENDED } else { 0 };
        let is_same_kind = self.port & Self::ENDED == kind;
        let is_older = since.wrapping_sub(self.since).cast_signed() < 0;
        if self.port == 0 || !is_same_kind && has_ended || is_same_kind && is_older {
            (self.since, self.port) = (since, kind | u32::from(port.number()));
        }
    }
}

map_type! {
    /// What was decided about a packet: what its flow's record says, and what is done with it.
    pub struct Decision {
        /// See [`super::Origin::backend`].
        pub backend: u32,
        /// See [`super::Origin::client_link`].
        pub client_link: u32,
        /// See [`super::Origin::generation`].
        pub generation: u16,
        /// See [`super::Origin::kind`].
        pub kind: u8,
        /// The [`crate::Outcome`] as a number.
        pub outcome: u8,
    }
}

impl Decision {
    /// A decision about a packet of a flow whose record says `origin`. A flow that is only masqueraded is counted where it
    /// is led to its backend.
    #[inline(always)]
    pub const fn new(outcome: Outcome, origin: Origin) -> Self {
        let outcome = if origin.has_backend() { outcome } else { Outcome::Masqueraded };
        let Origin { backend, client_link, generation, kind } = origin;
        Self { backend, client_link, generation, kind, outcome: outcome as u8 }
    }

    /// What the flow's record says.
    #[inline(always)]
    pub const fn origin(&self) -> Origin {
        let Self { backend, client_link, generation, kind, .. } = *self;
        Origin { backend, client_link, generation, kind }
    }

    /// What is done with the packet: one of those that a flow's packet can have.
    #[inline(always)]
    pub const fn outcome(&self) -> Outcome {
        const OPENED: u8 = Outcome::Opened as u8;
        const ESTABLISHED: u8 = Outcome::Established as u8;
        const REPLIED: u8 = Outcome::Replied as u8;
        const MASQUERADED: u8 = Outcome::Masqueraded as u8;
        match self.outcome {
            OPENED => Outcome::Opened,
            ESTABLISHED => Outcome::Established,
            REPLIED => Outcome::Replied,
            MASQUERADED => Outcome::Masqueraded,
            _ => Outcome::Forwarded,
        }
    }
}

map_type! {
    /// What a new flow asks for when it asks for a place.
    pub struct Request {
        /// The flow's hash, mixed anew with each place that was looked at.
        pub hash: u32,
        /// When it came, in ticks.
        pub now: u32,
        /// When it came, in microseconds.
        pub microseconds: u32,
        /// How many places were looked at.
        pub attempts: u32,
        /// 1: the node's own address is in the place of the client's, so that sockets of the host must not
        /// have it.
        pub masquerades: u32,
        /// The Service port's number; 0 if it has none.
        pub service: u32,
        /// The number of the backend that is told of if there is none.
        pub backend: u32,
        /// The best of the places that were taken.
        pub last_resort: LastResort,
    }
}

map_type! {
    /// Where functions of the datapath put what does not fit on the stack. No program reads what another has
    /// left there; a function that is to leave something says so.
    pub struct Memory<F> {
        /// A key to look at: the other direction's of a record, or the addresses of a packet quoted by an
        /// ICMP error, turned around.
        pub spare: FlowKey<F>,
        /// A record to be inserted among flows that are not live.
        pub embryo: EmbryoValue<F>,
        /// A record to be inserted among live flows.
        pub live: FlowValue<F>,
        /// A client with affinity, to be looked up.
        pub affinity: AffinityKey<F>,
        /// A client's address, to be looked up among source ranges.
        pub range: SourceRange<F>,
        /// Zero.
        pub pad: u32,
    }
}

map_type! {
    /// A packet in the datapath, per CPU: for IPv6 all this would not fit on the 512 bytes of an eBPF
    /// stack. What one program leaves here, all but `memory`, is what the next one goes on with.
    pub struct Work<F> {
        /// The packet's addresses as they arrived.
        pub key: FlowKey<F>,
        /// The other direction's key, once it is known.
        pub other: FlowKey<F>,
        /// For the functions.
        pub memory: Memory<F>,
        /// The packet's headers.
        pub packet: Packet,
        /// The headers of a packet quoted by an ICMP error.
        pub inner: Packet,
        /// What was decided, once it was.
        pub decision: Decision,
        /// The place that a new flow asks for.
        pub request: Request,
        /// The story that the packet began with, as a number.
        pub from: u32,
        /// Zero.
        pub pad: u32,
    }
}
