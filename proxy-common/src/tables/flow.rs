//! Flows: what was decided for a connection, so that all its packets are treated alike.
//!
//! A flow is two records, one per direction, each found under the packet's own addresses as they
//! arrive. A record holds the *other* direction's key, and that says all: to translate a packet, give
//! it the other direction's addresses, turned around. Each record can be made from the other.
//!
//! ```text
//! client → VIP       ingress  key {client, vip, cport, vport}       other ─┐
//! backend → client   egress   key {backend, client, bport, cport}  ◀───────┘
//! ```
//!
//! A flow from outside to a backend elsewhere is masqueraded where it leaves again, which is a second pair of
//! records, as of any flow that is masqueraded:
//!
//! ```text
//! client → backend   egress   key {client, backend, cport, bport}   other ─┐
//! backend → node     ingress  key {backend, node, bport, nport}    ◀───────┘
//! ```
//!
//! Between them is the host stack. **A short cut** past it is the two outer ends of both pairs, each with the other's key in
//! the place of what it had: `{client, vip} ⇄ {backend, node}`. What its records said before, and say of a packet that
//! goes by the stack all the same, follows from the two keys ([`FlowKey::lead_by_stack`]).
//!
//! **Where a flow is.** Live flows are in `flows_v4/6`, a hash that never evicts. All others are in
//! `embryos_v4/6`, an LRU: not answered, answered once, ended, or live but without room in the hash.
//! A record that was promoted stays behind there as a shadow, which is what the flow comes back to
//! when it ends. A look-up asks the hash first.
//!
//! **Who writes what.** While a flow goes on a direction's packets write [`FlowValue::state`], `seen` and the
//! counters of their own record only; what concerns both directions is read from both records. Where a flow
//! moves between the tables or ends, whoever sees that writes both; two that see it at once write the same.

use core::mem::offset_of;

use super::state::State;
use crate::addr::{Addr4, Address, Port, mix, spread};
use crate::{Family, Outcome, V4, map_type};

/// The hook at which a direction's packets are seen, in the view of the link they are on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Side {
    /// Coming from the link into the node.
    Ingress = 0,
    /// Going from the node out of the link.
    Egress = 1,
}

map_type! {
    /// One direction of a flow: a packet's addresses before translation. 16 bytes for IPv4, 40 for
    /// IPv6; aligned to 8, so that it is hashed and compared in words.
    #[repr(align(8))]
    pub struct FlowKey<F> {
        /// Source address.
        pub src: F::Addr,
        /// Destination address.
        pub dst: F::Addr,
        /// Source port.
        pub sport: Port,
        /// Destination port.
        pub dport: Port,
        /// Transport protocol.
        pub proto: u8,
        /// The [`Side`] as a number.
        pub side: u8,
        /// Zero.
        pub pad: [u8; 2],
    }
}

impl<F: Family> FlowKey<F> {
    /// A key of two addresses with their ports.
    #[inline(always)]
    pub const fn new(from: (F::Addr, Port), to: (F::Addr, Port), proto: u8, side: Side) -> Self {
        Self {
            src: from.0,
            dst: to.0,
            sport: from.1,
            dport: to.1,
            proto,
            side: side as u8,
            pad: [0; 2],
        }
    }

    /// The same ends the other way around, seen at `side`.
    #[inline(always)]
    #[must_use]
    pub const fn turned(&self, side: Side) -> Self {
        Self::new((self.dst, self.dport), (self.src, self.sport), self.proto, side)
    }

    /// Makes the other direction's key of a record whose packets take a short cut into what it is by the host stack: the
    /// packets of `own` that go on within the node have the source of the ones and the destination of the others.
    #[inline(always)]
    pub fn lead_by_stack(&mut self, own: &Self) {
        (self.dst, self.dport) = (own.src, own.sport);
        self.side = Side::Egress as u8;
    }

    /// A well-spread hash for the choice of a backend and of a source port.
    #[inline(always)]
    pub fn hash(&self, seed: u32) -> u32 {
        let ports = u32::from(self.sport.word()) << 16 | u32::from(self.dport.word());
        let kind = u32::from(self.proto) << 8 | u32::from(self.side);
        spread(mix(mix(self.dst.mix(self.src.mix(seed)), ports), kind))
    }

    /// Puts in what follows the addresses, in one store: who reads the key in larger words than it was written
    /// in waits for the stores.
    #[inline(always)]
    pub fn set_ports(&mut self, ports: [Port; 2], proto: u8, side: Side) {
        let words = self.words_mut();
        let rest: u32 = bytemuck::cast([proto, side as u8, 0, 0]);
        words[words.len() - 1] = bytemuck::cast([bytemuck::cast(ports), rest]);
    }

    /// What a key has in the place of zeros that is no packet's: of a claim on a place.
    pub const CLAIM: [u8; 2] = [1, 0];
    /// The same of the key under which it is noted when a connection was caught behind the kernel's NAT.
    pub const WHEN: [u8; 2] = [2, 0];
    /// The same of a port by which a VIP stands in for a client, toward a server of this node's own.
    pub const STAND_IN: [u8; 2] = [3, 0];
    /// The same by which the datapath tells the agent of a connection that was caught behind the kernel's NAT.
    pub const CAUGHT: [u8; 2] = [4, 0];

    /// How many words of 64 bits it has.
    pub(super) const WORDS: usize = size_of::<Self>() / 8;

    #[inline(always)]
    pub(super) fn words(&self) -> &[u64] {
        bytemuck::cast_slice(core::slice::from_ref(self))
    }

    #[inline(always)]
    pub(super) fn words_mut(&mut self) -> &mut [u64] {
        bytemuck::cast_slice_mut(core::slice::from_mut(self))
    }
}

impl FlowKey<V4> {
    /// Puts in the addresses, in one store.
    #[inline(always)]
    pub fn set_addresses(&mut self, src: Addr4, dst: Addr4) {
        self.words_mut()[0] = bytemuck::cast([src, dst]);
    }
}

/// What of a record never changes, beside the other direction's key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Origin {
    /// The backend's number; [`Origin::NO_BACKEND`] for flows that have none.
    pub backend: u32,
    /// The link that the client's first packet came in by, of clients outside the node; 0 otherwise.
    pub client_link: u32,
    /// The backend's generation when it was chosen.
    pub generation: u16,
    /// [`Origin::REPLY`] and its like.
    pub kind: u8,
}

impl Origin {
    /// The number of a backend that there is not.
    pub const NO_BACKEND: u32 = u32::MAX;
    /// Kind: the record of the backend's packets.
    pub const REPLY: u8 = 1;
    /// Kind: this direction's plain packets are sent on past the host stack: to the backend by its way, to the client by
    /// the link that leads to him.
    pub const SHORT_CUT: u8 = 2;
    /// Kind: this direction's packets go back out of the link that they came by (hairpin).
    pub const TURN: u8 = 4;
    /// Kind: the client's packets are masqueraded if they leave by an uplink. That is a flow of its own there.
    pub const MASQUERADES: u8 = 8;
    /// A flow without a Service, by the host stack.
    pub const NONE: Self =
        Self { backend: Self::NO_BACKEND, client_link: 0, generation: 0, kind: 0 };

    /// A flow of a Service from outside, where it is masqueraded.
    pub const MASQUERADED: Self = Self { kind: Self::MASQUERADES, ..Self::NONE };

    /// Whether it is of a client's packets from outside where they are masqueraded, which may take a short cut.
    #[inline(always)]
    pub const fn may_be_shortened(self) -> bool {
        !self.has_backend() && self.is(Self::MASQUERADES) && !self.is(Self::REPLY)
    }

    /// Whether it is the record of answers to a client outside the node: those leave by the link that leads to him.
    #[inline(always)]
    pub const fn answers_outside(self) -> bool {
        self.is(Self::REPLY) && self.client_link != 0
    }

    /// Whether it is of a Service's flow, and not of one that is only masqueraded.
    #[inline(always)]
    pub const fn has_backend(self) -> bool {
        self.backend != Self::NO_BACKEND
    }

    /// What it is of a packet that goes by the host stack, if plain ones take a short cut.
    #[inline(always)]
    #[must_use]
    pub const fn by_stack(self) -> Self {
        if !self.is(Self::SHORT_CUT) {
            self
        } else if self.is(Self::REPLY) {
            Self::MASQUERADED.inverse()
        } else {
            Self { kind: self.kind & !Self::SHORT_CUT, ..self }
        }
    }

    /// The same of a flow that takes a short cut.
    #[inline(always)]
    #[must_use]
    pub const fn shortened(self) -> Self {
        Self { kind: self.kind | Self::SHORT_CUT, ..self }
    }

    /// Whether one of these kinds is set.
    #[inline(always)]
    pub const fn is(self, kind: u8) -> bool {
        self.kind & kind != 0
    }

    /// What becomes of a packet that is translated, beside its way.
    #[inline(always)]
    pub const fn translated(self) -> Outcome {
        if !self.has_backend() {
            Outcome::Masqueraded
        } else if self.is(Self::REPLY) {
            Outcome::Replied
        } else {
            Outcome::Forwarded
        }
    }

    /// What becomes of a packet of a live flow.
    #[inline(always)]
    pub const fn outcome(self) -> Outcome {
        if self.is(Self::SHORT_CUT) {
            Outcome::ShortCut
        } else if self.is(Self::TURN) {
            Outcome::Hairpin
        } else {
            self.translated()
        }
    }

    /// What the other direction's record has in this one's place.
    #[inline(always)]
    #[must_use]
    pub const fn inverse(self) -> Self {
        Self { kind: self.kind ^ Self::REPLY, ..self }
    }

    /// All but the backend, in one word: as it lies in a record, without the state.
    #[inline(always)]
    pub(super) fn word(self) -> u64 {
        let [low, high] = self.generation.to_ne_bytes();
        bytemuck::cast([self.client_link, u32::from_ne_bytes([low, high, self.kind, 0])])
    }
}

map_type! {
    /// What a direction's packets need, in one look-up. 56 bytes for IPv4, 80 for IPv6: with the key and
    /// the kernel's header of 48 (56 from Linux 6.1 on) an element fills an allocation of 128 or 192
    /// bytes, and a hit touches its bucket and two lines, or three.
    pub struct FlowValue<F> {
        /// The other direction's key.
        pub other: FlowKey<F>,
        /// [`tag`] of its own key and all that never changes, against readers that raced with a reuse of
        /// the element.
        pub tag: u32,
        /// See [`Origin::backend`].
        pub backend: u32,
        /// See [`Origin::client_link`].
        pub client_link: u32,
        /// See [`Origin::generation`].
        pub generation: u16,
        /// See [`Origin::kind`].
        pub kind: u8,
        /// This direction's [`State`] as a number.
        pub state: u8,
        /// Packets of this direction that no story has seen since these were last handed over: to their
        /// Service port's traffic and to the outcomes.
        pub packets: u32,
        /// Their bytes, link-layer headers included. Both are counted in one step.
        pub bytes: u32,
        /// When this direction was last used, in ticks.
        pub seen: u32,
        /// The link by which its packets leave, of what leaves by an uplink or takes a short cut: as it was when a story saw
        /// one, which is once a tick. 0: not known yet.
        pub link: u32,
        /// From which tick on a short cut may be asked for, of a client's packets that are masqueraded.
        pub ask_at: u32,
        /// The longest IP packet that a short cut to the client takes; 0 if that is not known.
        pub mtu: u16,
        /// 1: a policy of the host's led its packets when they left: they had a mark, or went by a gateway of their own.
        pub marked: u16,
    }
}

map_type! {
    /// A record of a flow that is not live: as [`FlowValue`], but for the end.
    pub struct EmbryoValue<F> {
        /// See [`FlowValue::other`].
        pub other: FlowKey<F>,
        /// See [`FlowValue::tag`].
        pub tag: u32,
        /// See [`Origin::backend`].
        pub backend: u32,
        /// See [`Origin::client_link`].
        pub client_link: u32,
        /// See [`Origin::generation`].
        pub generation: u16,
        /// See [`Origin::kind`].
        pub kind: u8,
        /// This direction's [`State`] as a number.
        pub state: u8,
        /// As in [`FlowValue::packets`].
        pub packets: u32,
        /// Their bytes, link-layer headers included. Both are counted in one step.
        pub bytes: u32,
        /// When this direction was last used, in ticks.
        pub seen: u32,
        /// The backend's record, TCP: what the client acknowledges if it has heard the backend.
        pub proof: u32,
        /// When the flow was opened, in microseconds of `CLOCK_MONOTONIC`, for the latency of its answer.
        pub opened: u32,
        /// When the flow ended, in ticks.
        pub ended: u32,
    }
}

const _: () = {
    const fn alike<F: Family>() -> bool {
        size_of::<FlowValue<F>>() == size_of::<EmbryoValue<F>>()
            && offset_of!(FlowValue<F>, tag) == offset_of!(EmbryoValue<F>, tag)
            && offset_of!(FlowValue<F>, state) == offset_of!(EmbryoValue<F>, state)
            && offset_of!(FlowValue<F>, packets) == offset_of!(EmbryoValue<F>, packets)
            && offset_of!(FlowValue<F>, seen) == offset_of!(EmbryoValue<F>, seen)
            && offset_of!(FlowValue<F>, tag) % 8 == 0
            && offset_of!(FlowValue<F>, client_link) == offset_of!(FlowValue<F>, tag) + 8
            && offset_of!(FlowValue<F>, packets) == offset_of!(FlowValue<F>, tag) + 16
            && offset_of!(FlowValue<F>, seen) == offset_of!(FlowValue<F>, tag) + 24
    }
    assert!(alike::<V4>() && alike::<crate::V6>());
    assert!(size_of::<FlowValue<V4>>() == 56 && size_of::<FlowValue<crate::V6>>() == 80);
};

/// For how many ticks a flow goes by the host stack whole before a short cut is asked for, so that short ones do to their end.
pub const SHORT_CUT_AFTER: u32 = 2;

/// What [`tag`] adds to words before it multiplies them: odd, and one for each.
const TERMS: [u64; 12] = [
    0x9e37_79b9_7f4a_7c15,
    0xbf58_476d_1ce4_e5b9,
    0x94d0_49bb_1331_11eb,
    0xd6e8_feb8_6659_fd93,
    0xa076_1d64_78bd_642f,
    0xe703_7ed1_a0b4_28db,
    0x8ebc_6af0_9c88_c6e3,
    0x5899_65cc_7537_4cc3,
    0x1d8e_4e27_c47d_124f,
    0xeb44_acca_b455_d165,
    0x2127_599b_f432_5c37,
    0x8803_55f2_1e6d_1965,
];

/// What vouches for a record: a hash of its own key and of all that never changes. Whoever has read a
/// record compares it with the tag that lies there, and so knows that no field was another record's;
/// in whatever order the kernel has copied them. A sum of products of two words each (as in NH, the hash under
/// UMAC, RFC 4418), which a CPU computes in parallel.
#[inline(always)]
pub fn tag<F: Family>(key: &FlowKey<F>, other: &FlowKey<F>, origin: Origin) -> u32 {
    let mut sum = product(origin.word(), u64::from(origin.backend), 0);
    for (position, (own, others)) in key.words().iter().zip(other.words()).enumerate() {
        sum = sum.wrapping_add(product(*own, *others, 2 + 2 * position));
    }
    (sum >> 32) as u32
}

#[inline(always)]
const fn product(one: u64, two: u64, term: usize) -> u64 {
    one.wrapping_add(TERMS[term]).wrapping_mul(two.wrapping_add(TERMS[term + 1]))
}

/// What a record said when it was read, all of it verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    /// What of it never changes, of a packet that goes by the host stack.
    pub origin: Origin,
    /// The same of a plain packet, which takes the short cut if there is one.
    pub plain: Origin,
    /// How far its direction has come.
    pub state: State,
    /// When it was last used, in ticks.
    pub seen: u32,
    /// See [`FlowValue::link`]. Means nothing if the flow is not live.
    pub link: u32,
}

impl Facts {
    /// Whether it is in that state.
    #[inline(always)]
    pub fn is_in(&self, state: State) -> bool {
        self.state == state
    }

    /// Whether plain packets of its direction take a short cut.
    #[inline(always)]
    pub const fn is_cut(&self) -> bool {
        self.plain.is(Origin::SHORT_CUT)
    }

    /// Whether it has been idle for longer than `timeout` ticks.
    #[inline(always)]
    pub const fn expired(&self, timeout: u32, now: u32) -> bool {
        expired(self.seen, timeout, now)
    }
}

/// What only a record of a flow that is not live says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Making {
    /// See [`EmbryoValue::proof`].
    pub proof: u32,
    /// See [`EmbryoValue::opened`].
    pub opened: u32,
    /// See [`EmbryoValue::ended`].
    pub ended: u32,
}

impl<F: Family> FlowValue<F> {
    /// A live flow's record.
    #[inline(always)]
    pub fn fill(&mut self, key: &FlowKey<F>, other: &FlowKey<F>, origin: Origin, now: u32) {
        self.other = *other;
        self.tag = tag(key, other, origin);
        (self.backend, self.client_link) = (origin.backend, origin.client_link);
        (self.generation, self.kind) = (origin.generation, origin.kind);
        (self.state, self.seen) = (State::Established as u8, now);
        (self.packets, self.bytes) = (0, 0);
        (self.link, self.ask_at) = (0, now.wrapping_add(SHORT_CUT_AFTER));
        (self.mtu, self.marked) = (0, 0);
    }

    /// What the record says, of a packet that goes by the host stack.
    pub const fn facts(&self) -> Facts {
        let Self { backend, client_link, generation, kind, state, seen, link, .. } = *self;
        let plain = Origin { backend, client_link, generation, kind };
        Facts { origin: plain.by_stack(), plain, state: State::of(state), seen, link }
    }

    /// The other direction's key, of a packet that goes by the host stack.
    pub fn other_by_stack(&self, key: &FlowKey<F>) -> FlowKey<F> {
        let mut other = self.other;
        if self.kind & Origin::SHORT_CUT != 0 {
            other.lead_by_stack(key);
        }
        other
    }
}

impl<F: Family> EmbryoValue<F> {
    /// A record of a flow in that state.
    #[inline(always)]
    pub fn fill(
        &mut self,
        key: &FlowKey<F>,
        other: &FlowKey<F>,
        origin: Origin,
        state: State,
        (now, opened): (u32, u32),
    ) {
        self.other = *other;
        self.tag = tag(key, other, origin);
        (self.backend, self.client_link) = (origin.backend, origin.client_link);
        (self.generation, self.kind) = (origin.generation, origin.kind);
        (self.state, self.seen) = (state as u8, now);
        (self.packets, self.bytes) = (0, 0);
        (self.proof, self.opened, self.ended) = (0, opened, now);
    }

    /// What the record says.
    pub const fn facts(&self) -> Facts {
        let Self { backend, client_link, generation, kind, state, seen, .. } = *self;
        let (origin, state) = (Origin { backend, client_link, generation, kind }, State::of(state));
        Facts { origin, plain: origin, state, seen, link: 0 }
    }
}

/// Whether a record seen at `seen` has been idle for longer than `timeout`. `now` may be older than
/// `seen`: another CPU's clock, or one read before a long scan.
#[inline(always)]
pub const fn expired(seen: u32, timeout: u32, now: u32) -> bool {
    now.wrapping_sub(seen).cast_signed() > timeout.cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Addr4, V4};

    fn key(host: u8, port: u16) -> FlowKey<V4> {
        let end = |host, port| (Addr4 { octets: [10, 0, 0, host] }, Port::new(port));
        FlowKey::new(end(host, port), end(200, 80), 6, Side::Ingress)
    }

    #[test]
    fn a_tag_vouches_for_the_key_and_for_each_field_that_never_changes() {
        let origin = Origin { backend: 7, client_link: 2, generation: 3, kind: Origin::REPLY };
        let (own, other) = (key(1, 1000), key(2, 2000));
        let right = tag(&own, &other, origin);
        let changed = [
            tag(&other, &own, origin),
            tag(&key(1, 1001), &other, origin),
            tag(&own, &key(2, 2001), origin),
            tag(&own, &other, Origin { backend: 8, ..origin }),
            tag(&own, &other, Origin { client_link: 3, ..origin }),
            tag(&own, &other, Origin { generation: 4, ..origin }),
            tag(&own, &other, Origin { kind: 0, ..origin }),
        ];
        assert!(changed.iter().all(|tag| *tag != right));
    }

    #[test]
    fn either_record_can_be_made_from_the_other() {
        for (client_link, kind) in [(0, 0), (0, Origin::TURN), (4, Origin::MASQUERADES), (4, 0)] {
            let forward = Origin { backend: 1, client_link, generation: 1, kind };
            let reply = forward.inverse();
            assert!(reply.is(Origin::REPLY));
            assert_eq!(reply.inverse(), forward);
        }
    }

    #[test]
    fn what_takes_a_short_cut_still_says_how_it_goes_by_the_stack() {
        let end = |host, port| (Addr4 { octets: [10, 0, 0, host] }, Port::new(port));
        let (client, vip, pod, node) = (end(1, 1000), end(2, 80), end(3, 8080), end(4, 1001));
        let asked = FlowKey::<V4>::new(client, vip, 6, Side::Ingress);
        let answered = FlowKey::<V4>::new(pod, node, 6, Side::Ingress);
        let kind = Origin::MASQUERADES;
        let origin = Origin { backend: 7, client_link: 2, generation: 3, kind };
        let mut value: FlowValue<V4> = bytemuck::Zeroable::zeroed();
        value.fill(&asked, &answered, origin.shortened(), 1);
        let outer = FlowKey::new(pod, client, 6, Side::Egress);
        assert_eq!((value.other_by_stack(&asked), value.facts().origin), (outer, origin));
        value.fill(&answered, &asked, origin.inverse().shortened(), 1);
        let inner = FlowKey::new(client, pod, 6, Side::Egress);
        let masqueraded = Origin::MASQUERADED.inverse();
        assert_eq!((value.other_by_stack(&answered), value.facts().origin), (inner, masqueraded));
    }
}
