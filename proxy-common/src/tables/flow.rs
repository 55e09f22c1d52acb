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

use core::marker::PhantomData;
use core::ptr::NonNull;

use super::service::{AffinityKey, SourceRange};
use crate::addr::{Address, Port, mix, spread};
use crate::{Family, map_type};

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
    /// One direction of a flow: a packet's addresses before translation.
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

    /// What [`FlowValue::tag`] must be for this key.
    #[inline(always)]
    pub fn tag(&self) -> u32 {
        self.mixed(0)
    }

    /// A well-spread hash for the choice of a backend and of a source port.
    #[inline(always)]
    pub fn hash(&self, seed: u32) -> u32 {
        spread(self.mixed(seed))
    }

    #[inline(always)]
    fn mixed(&self, seed: u32) -> u32 {
        let ports = u32::from(self.sport.word()) << 16 | u32::from(self.dport.word());
        let kind = u32::from(self.proto) << 8 | u32::from(self.side);
        mix(mix(self.dst.mix(self.src.mix(seed)), ports), kind)
    }
}

/// How far a flow has come. The numbers are in the maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum State {
    /// Not answered yet.
    Embryo = 0,
    /// Answered once, and the client has not been heard of since.
    Answered = 1,
    /// Both sides have heard of each other.
    Established = 2,
    /// TCP: one side has sent its FIN.
    HalfClosed = 3,
    /// TCP: both sides have sent their FIN.
    Closing = 4,
    /// TCP: reset. Another flow may have the record's place at once.
    Closed = 5,
}

impl State {
    /// The state's name in listings.
    pub const fn label(number: u8) -> &'static str {
        match number {
            0 => "embryo",
            1 => "answered",
            2 => "established",
            3 => "half-closed",
            4 => "closing",
            5 => "closed",
            _ => "?",
        }
    }
}

map_type! {
    /// What a direction's packets need, in one look-up.
    pub struct FlowValue<F> {
        /// [`FlowKey::tag`] of its own key, against a reader that raced with a reuse of the element.
        pub tag: u32,
        /// The other direction's key.
        pub other: FlowKey<F>,
        /// When this direction was last used, in ticks.
        pub seen: u32,
        /// How many ticks this direction may be idle.
        pub timeout: u32,
        /// The Service port's id.
        pub service: u32,
        /// The backend's number.
        pub backend: u32,
        /// The link that this direction's packets leave by, past the host stack; 0 or
        /// [`FlowValue::BY_STACK`]: by the host stack.
        pub link: u32,
        /// The link that the other direction's packets leave by.
        pub other_link: u32,
        /// The backend's generation when it was chosen.
        pub generation: u16,
        /// The [`State`] as a number.
        pub state: u8,
        /// [`FlowValue::FIN_FORWARD`] and its like.
        pub flags: u8,
    }
}

impl<F: Family> FlowValue<F> {
    /// A FIN was seen in the direction of the client's packets.
    pub const FIN_FORWARD: u8 = 1;
    /// A FIN was seen in the direction of the backend's packets.
    pub const FIN_REPLY: u8 = 2;
    /// This is the record of the backend's packets.
    pub const IS_REPLY: u8 = 4;
    /// As a link: by the host stack, although the packet seems to go back to where it came from. So go
    /// answers of flows that are masqueraded for a pod of this node.
    pub const BY_STACK: u32 = u32::MAX;

    /// Whether the record has been idle for longer than it may.
    #[inline(always)]
    pub const fn expired(&self, now: u32) -> bool {
        expired(self.seen, self.timeout, now)
    }

    /// Whether it stands for a flow that is a load for its backend: one of a client's records that has
    /// neither ended nor fallen silent.
    pub const fn is_counted(&self, now: u32) -> bool {
        self.flags & Self::IS_REPLY == 0 && self.state < State::Closing as u8 && !self.expired(now)
    }
}

/// Whether a record seen at `seen` has been idle for longer than `timeout`. `now` may be older than
/// `seen`: another CPU's clock, or one read before a long scan.
#[inline(always)]
pub const fn expired(seen: u32, timeout: u32, now: u32) -> bool {
    now.wrapping_sub(seen).cast_signed() > timeout.cast_signed()
}

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
    /// What the datapath works on while it has a packet. In per-CPU memory: for IPv6 it would not fit
    /// on the 512 bytes of an eBPF stack.
    pub struct Work<F> {
        /// The packet's headers.
        pub packet: Packet,
        /// The headers of a packet quoted by an ICMP error.
        pub inner: Packet,
        /// The packet's addresses as they arrived.
        pub key: FlowKey<F>,
        /// The other direction's key, once it is known.
        pub other: FlowKey<F>,
        /// The addresses of a packet quoted by an ICMP error, turned around.
        pub quoted: FlowKey<F>,
        /// The record of the client's packets, of a flow in the making.
        pub forward: FlowValue<F>,
        /// The record of the backend's packets. Each record's `other` is the other's key.
        pub reply: FlowValue<F>,
        /// The link that the packet leaves by, past the host stack; 0: by the host stack.
        pub link: u32,
        /// The longest IP packet that the way there takes; 0 if it is not known.
        pub mtu: u32,
        /// A client with affinity, to be looked up.
        pub affinity: AffinityKey<F>,
        /// A client's address, to be looked up among source ranges.
        pub range: SourceRange<F>,
    }
}

#[inline(always)]
fn words_of<F: Family>(key: &mut FlowKey<F>) -> &mut [u32] {
    bytemuck::cast_slice_mut(core::slice::from_mut(key))
}

/// A record in its map, read and written in place, field by field.
///
/// Other CPUs and the kernel's own reuse of deleted elements may change it at any time, so each field
/// is read once and [`FlowRecord::verified`] is asked afterwards.
#[derive(Clone, Copy)]
pub struct FlowRecord<'a, F: Family> {
    value: NonNull<FlowValue<F>>,
    table: PhantomData<&'a FlowValue<F>>,
}

macro_rules! fields {
    ($($(#[$doc:meta])+ $get:ident, $set:ident: $type:ty;)+) => {$(
        $(#[$doc])+
        #[inline(always)]
        pub fn $get(&self) -> $type {
            // SAFETY: `new`'s caller promised that the pointer stays readable for 'a; any bytes are
            // a valid value of a Pod type.
            unsafe { (&raw const (*self.value.as_ptr()).$get).read_volatile() }
        }

        /// Stores the field that the method of the same name without `set_` reads.
        #[inline(always)]
        pub fn $set(&self, value: $type) {
            // SAFETY: as for reading; the maps are shared memory, where racing stores of one word are
            // the accepted way to update.
            unsafe { (&raw mut (*self.value.as_ptr()).$get).write_volatile(value) }
        }
    )+};
}

impl<F: Family> FlowRecord<'_, F> {
    /// A record at `value`.
    ///
    /// # Safety
    /// The memory must stay readable and writable for the record's lifetime and may only be accessed
    /// through such records meanwhile.
    #[inline(always)]
    pub const unsafe fn new(value: NonNull<FlowValue<F>>) -> Self {
        Self { value, table: PhantomData }
    }

    /// A record of its own, never freed: as the kernel keeps a deleted element readable.
    #[cfg(feature = "testing")]
    pub fn leaked(value: FlowValue<F>) -> Self {
        let value = NonNull::from(Box::leak(Box::new(value)));
        // SAFETY: it is never freed, and nobody else knows of it.
        unsafe { Self::new(value) }
    }

    fields! {
        /// The tag, see [`FlowValue::tag`].
        tag, set_tag: u32;
        /// When this direction was last used, in ticks.
        seen, set_seen: u32;
        /// How many ticks this direction may be idle.
        timeout, set_timeout: u32;
        /// The Service port's id.
        service, set_service: u32;
        /// The backend's number.
        backend, set_backend: u32;
        /// The link that this direction's packets leave by, see [`FlowValue::link`].
        link, set_link: u32;
        /// The link that the other direction's packets leave by.
        other_link, set_other_link: u32;
        /// The backend's generation when it was chosen.
        generation, set_generation: u16;
        /// The [`State`] as a number.
        state, set_state: u8;
        /// The flags, see [`FlowValue`].
        flags, set_flags: u8;
    }

    /// Copies the other direction's key to `key`, word by word.
    #[inline(always)]
    pub fn read_other(&self, key: &mut FlowKey<F>) {
        // SAFETY: `new`'s caller promised that the pointer stays readable for 'a.
        let from = unsafe { &raw const (*self.value.as_ptr()).other }.cast::<u32>();
        for (position, word) in words_of(key).iter_mut().enumerate() {
            // SAFETY: both are as many words of the same type.
            *word = unsafe { from.add(position).read_volatile() };
        }
    }

    /// Whether the other direction's key is `key`.
    #[inline(always)]
    pub fn leads_to(&self, key: &FlowKey<F>) -> bool {
        // SAFETY: `new`'s caller promised that the pointer stays readable for 'a.
        let other = unsafe { &raw const (*self.value.as_ptr()).other }.cast::<u32>();
        let words = bytemuck::cast_slice::<_, u32>(core::slice::from_ref(key));
        let mut differences = 0;
        for (position, word) in words.iter().enumerate() {
            // SAFETY: both are as many words of the same type.
            differences |= *word ^ unsafe { other.add(position).read_volatile() };
        }
        differences == 0
    }

    /// Whether what was read before belongs to `key`. The kernel writes an element's first bytes
    /// first, so a tag that still fits vouches for everything behind it.
    #[inline(always)]
    pub fn verified(&self, key: &FlowKey<F>) -> bool {
        self.tag() == key.tag()
    }

    /// Whether the record has been idle for longer than it may.
    #[inline(always)]
    pub fn expired(&self, now: u32) -> bool {
        expired(self.seen(), self.timeout(), now)
    }

    /// Notes that the record was used. Stores only when the tick has changed, so that a busy flow's
    /// cache line stays clean.
    #[inline(always)]
    pub fn touch(&self, now: u32) {
        if self.seen() != now {
            self.set_seen(now);
        }
    }
}
