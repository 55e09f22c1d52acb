//! A packet's headers, checked once.

mod access;
pub mod tcp;
mod v4;
mod v6;

pub use access::{Frame, Route, Window};
use proxy_common::checksum::Delta;
use proxy_common::tables::{FlowKey, FragmentKey, Packet, Part, Side};
use proxy_common::{Family, Outcome, Port, proto};

/// The shape of a family's headers: all that the datapath needs to know of it.
pub trait Wire: Family {
    /// The length of the fixed header.
    const HEADER: usize;
    /// Where the source address lies in the header; the destination's follows it.
    const SOURCE: usize;
    /// The quoted packet of a port-unreachable message may be this long at most.
    const MAX_QUOTE: usize;
    /// Type and code of "port unreachable" (RFC 792, RFC 4443).
    const PORT_UNREACHABLE: [u8; 2];

    /// Reads the IP header at `l3`, passing over options and extension headers, and puts its addresses
    /// into `key`. `None` if it is cut short or no valid header.
    fn headers<P: Frame>(frame: &mut P, l3: usize, key: &mut FlowKey<Self>) -> Option<Packet>;

    /// The common case of a packet: no options or extension headers, no fragment, more than one hop left, TCP or UDP, all
    /// of it reachable at fixed offsets; with its addresses and ports. `None` for any other packet.
    fn plain<P: Frame>(frame: &mut P, side: Side) -> Option<(Plain, FlowKey<Self>)>;

    /// Types of ICMP's echo request and of its answer.
    const ECHO: [u8; 2];
    /// Where an echo's checksum lies.
    const ECHO_CHECKSUM: usize = 2;
    /// Where an echo's identifier lies.
    const ECHO_ID: usize = 4;

    /// Whether an ICMP type reports an error and so quotes the packet that met it. Redirects are no
    /// errors.
    fn is_error(icmp_type: u8) -> bool;

    /// How far behind the start of an ICMP message, at `l4`, the packet begins that is redirected (RFC 792, RFC 4861). `None`
    /// if it is no redirect.
    fn redirected<P: Frame>(frame: &P, l4: usize) -> Option<usize>;

    /// Gives the header that the window begins with new addresses, source and destination. `change` is what
    /// that means for its own checksum, if it has one.
    fn set_addresses<W: Window>(
        window: &mut W,
        new: (&Self::Addr, &Self::Addr),
        change: Delta,
    ) -> Option<()>;

    /// Counts a hop, as a router does. `None` if the packet has no hop left, or can't be changed.
    fn hop<P: Frame>(frame: &mut P, l3: usize) -> Option<()>;

    /// Writes a fresh header at `l3` for `length` bytes of payload.
    fn write_header<P: Frame>(
        frame: &mut P,
        l3: usize,
        addresses: (&Self::Addr, &Self::Addr),
        proto: u8,
        length: u16,
    ) -> Option<()>;

    /// The length of the IP packet at `l3`, header and all, as it says itself.
    fn total_length<P: Frame>(frame: &P, l3: usize) -> Option<usize>;
}

/// What the headers of a plain packet say beside the addresses.
///
/// Wide fields: narrow ones share a register, and each use of one would pick it out.
#[derive(Clone, Copy)]
pub struct Plain {
    /// TCP or UDP.
    pub proto: u32,
    /// TCP's flags; 0 otherwise.
    pub flags: u32,
    /// The transport header's checksum, as it lies there.
    pub checksum: u32,
}

impl Plain {
    /// Whether it is of that protocol.
    #[inline(always)]
    pub fn is(self, number: u8) -> bool {
        self.proto == u32::from(number)
    }

    /// Whether one of these TCP flags is set.
    #[inline(always)]
    pub fn has(self, flags: u8) -> bool {
        self.flags & u32::from(flags) != 0
    }

    /// Whether it may be the first of its flow.
    #[inline(always)]
    pub fn begins(self) -> bool {
        !self.is(proto::TCP) || tcp::opens(self.flags as u8)
    }

    /// As [`parse`] says it. What is no fragment needs no number.
    #[inline(always)]
    pub fn packet<F: Wire, P: Frame>(self) -> Packet {
        Packet {
            l4: (P::NETWORK + F::HEADER) as u32,
            id: 0,
            proto: self.proto as u8,
            flags: self.flags as u8,
            part: Part::Whole as u8,
            pad: 0,
        }
    }
}

/// Reads the start of a transport header behind an IP header of fixed length: its ports, too.
#[inline(always)]
fn plain_transport<F: Wire, P: Frame>(frame: &mut P, number: u8) -> Option<(Plain, u32)> {
    if number == proto::UDP {
        let window = frame.headers(F::HEADER + tcp::UDP_HEADER)?;
        let checksum = window.load::<u16>(F::HEADER + tcp::UDP_CHECKSUM)?.into();
        let plain = Plain { proto: proto::UDP.into(), flags: 0, checksum };
        return Some((plain, window.load(F::HEADER)?));
    }
    let window = frame.headers(F::HEADER + size_of::<tcp::Header>())?;
    let [_, flags]: [u8; 2] = window.load(F::HEADER + tcp::OFFSET_AND_FLAGS)?;
    let checksum = window.load::<u16>(F::HEADER + tcp::CHECKSUM)?.into();
    let plain = Plain { proto: proto::TCP.into(), flags: flags.into(), checksum };
    Some((plain, window.load(F::HEADER)?))
}

/// Headers are looked for in this many bytes.
pub const REACH: usize = 256;

/// Reads the headers of the packet in `frame` into `packet` and its addresses into `key`, with ports of
/// 0 where there are none.
///
/// # Errors
/// [`Outcome::Malformed`] if they are cut short or no valid headers.
#[inline(always)]
pub fn parse<F: Wire, P: Frame>(
    frame: &mut P,
    side: Side,
    packet: &mut Packet,
    key: &mut FlowKey<F>,
) -> Result<(), Outcome> {
    let smallest = P::NETWORK + F::HEADER + size_of::<tcp::Header>();
    frame.want(smallest);
    let Some(headers) = F::headers(frame, P::NETWORK, key) else { return Err(Outcome::Malformed) };
    forget(packet, headers);
    (key.sport, key.dport) = (Port::new(0), Port::new(0));
    (key.proto, key.side, key.pad) = (packet.proto, side as u8, [0; 2]);
    if !packet.is(Part::Later) && has_ports(packet.proto) {
        return read_ports(frame, packet, key);
    }
    Ok(())
}

#[inline(always)]
fn read_ports<F: Family, P: Frame>(
    frame: &P,
    packet: &mut Packet,
    key: &mut FlowKey<F>,
) -> Result<(), Outcome> {
    let Some(ports) = frame.load::<[Port; 2]>(packet.l4()) else { return Err(Outcome::Malformed) };
    [key.sport, key.dport] = ports;
    if packet.proto == proto::TCP {
        // Two bytes, never one: see docs/decisions/0002 on single bytes at variable offsets.
        let flags = packet.l4() + tcp::OFFSET_AND_FLAGS;
        let Some([_, flags]) = frame.load::<[u8; 2]>(flags) else { return Err(Outcome::Malformed) };
        packet.flags = flags;
    }
    Ok(())
}

/// Stores what was read and makes the compiler read it anew, so that the verifier forgets by which of
/// the many paths through the headers it came. Each path would otherwise be verified with all that
/// follows: 540,000 instructions instead of a few thousand.
#[inline(always)]
pub fn forget(place: &mut Packet, headers: Packet) {
    *place = headers;
    core::hint::black_box(place);
}

/// How the packet's datagram is known in the fragment table.
#[inline(always)]
pub fn fragment_key<F: Family>(packet: &Packet, key: &FlowKey<F>) -> FragmentKey<F> {
    FragmentKey {
        src: key.src,
        dst: key.dst,
        id: packet.id,
        proto: key.proto,
        side: key.side,
        pad: [0; 2],
    }
}

/// Whether a protocol begins with two ports.
#[inline(always)]
pub fn has_ports(number: u8) -> bool {
    matches!(number, proto::TCP | proto::UDP | proto::SCTP)
}
