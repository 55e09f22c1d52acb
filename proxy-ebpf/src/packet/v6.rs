//! IPv6 (RFC 8200).

use bytemuck::{Pod, Zeroable};
use proxy_common::checksum::Delta;
use proxy_common::tables::{FlowKey, Packet, Part, Side};
use proxy_common::{Addr6, V6, proto};

use super::{Frame, Plain, REACH, Window, Wire, plain_transport, tcp};

/// The fixed header.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    version: u8,
    class_and_label: [u8; 3],
    payload_length: [u8; 2],
    next: u8,
    hop_limit: u8,
    src: Addr6,
    dst: Addr6,
}

/// The first eight bytes of an extension header, which all of them have. Offset and identification
/// are the fragment header's, where the length is reserved.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ExtensionHeader {
    next: u8,
    length: u8,
    offset: [u8; 2],
    id: [u8; 4],
}

/// `ICMPv6`'s type of a redirect, the length of its header, and the types of options behind it.
const REDIRECT: u8 = 137;
const REDIRECT_HEADER: usize = 40;
const LINK_ADDRESS: u8 = 2;
const REDIRECTED_PACKET: u8 = 4;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;

/// The next header, and the hop limit behind it.
const HOPS: usize = 6;

/// How many extension headers are passed over. Linux has no limit, but nobody sends more.
const MAX_EXTENSIONS: usize = 6;

/// Whether another header follows that is passed over.
#[inline(always)]
fn is_extension(number: u8) -> bool {
    matches!(number, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION | MOBILITY)
}

/// Passes over the extension headers from `packet.l4` on. A later fragment ends the walk: what follows
/// its fragment header is payload.
#[inline(always)]
fn skip_extensions<P: Frame>(frame: &P, mut packet: Packet) -> Option<Packet> {
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(packet.proto) || packet.is(Part::Later) {
            break;
        }
        let header: ExtensionHeader = frame.load(packet.l4())?;
        let length = match packet.proto {
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(header.length) + 2) * 4,
            _ => (u32::from(header.length) + 1) * 8,
        };
        if packet.proto == FRAGMENT {
            packet.id = u32::from_ne_bytes(header.id);
            packet.part = part_of(u16::from_be_bytes(header.offset));
        }
        packet.l4 += length;
        packet.proto = header.next;
    }
    Some(packet)
}

/// The part that a fragment header's offset and flag tell of. An "atomic" fragment (RFC 6946) is whole.
#[inline(always)]
fn part_of(bits: u16) -> u8 {
    let part = match (bits & 0xfff8 != 0, bits & 1 != 0) {
        (true, _) => Part::Later,
        (false, true) => Part::First,
        (false, false) => Part::Whole,
    };
    part as u8
}

impl Wire for V6 {
    const HEADER: usize = 40;
    const SOURCE: usize = 8;
    const MAX_QUOTE: usize = 40 + 48 + 8;
    const PORT_UNREACHABLE: [u8; 2] = [1, 4];
    const ECHO: [u8; 2] = [128, 129];

    #[inline(always)]
    fn headers<P: Frame>(frame: &mut P, l3: usize, key: &mut FlowKey<Self>) -> Option<Packet> {
        let header: Header = frame.load(l3)?;
        (key.src, key.dst) = (header.src, header.dst);
        if header.version >> 4 != 6 {
            return None;
        }
        if is_extension(header.next) {
            frame.want(REACH);
        }
        let l4 = (l3 + Self::HEADER) as u32;
        let start = Packet { l4, id: 0, proto: header.next, flags: 0, part: 0, pad: 0 };
        skip_extensions(frame, start)
    }

    #[inline(always)]
    fn plain<P: Frame>(frame: &mut P, side: Side) -> Option<(Plain, FlowKey<Self>)> {
        frame.want(P::NETWORK + Self::HEADER + size_of::<tcp::Header>());
        let header: Header = frame.headers(Self::HEADER)?.load(0)?;
        let is_plain = header.version >> 4 == 6
            && header.hop_limit > 1
            && matches!(header.next, proto::TCP | proto::UDP);
        if !is_plain {
            return None;
        }
        let (plain, ports) = plain_transport::<Self, P>(frame, header.next)?;
        let mut key = FlowKey::zeroed();
        (key.src, key.dst) = (header.src, header.dst);
        key.set_ports(bytemuck::cast(ports), header.next, side);
        Some((plain, key))
    }

    /// Types below 128 are errors; the four that RFC 4443 defines quote a packet.
    #[inline(always)]
    fn is_error(icmp_type: u8) -> bool {
        matches!(icmp_type, 1..=4)
    }

    /// The packet is in an option, which the one with a link-layer address of eight bytes may come before.
    #[inline(always)]
    fn redirected<P: Frame>(frame: &P, l4: usize) -> Option<usize> {
        let [kind, _]: [u8; 2] = frame.load(l4)?;
        if kind != REDIRECT {
            return None;
        }
        match frame.load::<[u8; 2]>(l4 + REDIRECT_HEADER)? {
            [REDIRECTED_PACKET, _] => Some(REDIRECT_HEADER + 8),
            [LINK_ADDRESS, 1] => Some(REDIRECT_HEADER + 16),
            _ => None,
        }
    }

    #[inline(always)]
    fn set_addresses<W: Window>(
        window: &mut W,
        new: (&Addr6, &Addr6),
        _change: Delta,
    ) -> Option<()> {
        window.store(Self::SOURCE, [*new.0, *new.1])
    }

    #[inline(always)]
    fn hop<P: Frame>(frame: &mut P, l3: usize) -> Option<()> {
        let [next, hops]: [u8; 2] = frame.load(l3 + HOPS)?;
        if hops <= 1 {
            return None;
        }
        frame.store(l3 + HOPS, [next, hops - 1])
    }

    #[inline(always)]
    fn write_header<P: Frame>(
        frame: &mut P,
        l3: usize,
        (src, dst): (&Addr6, &Addr6),
        proto: u8,
        length: u16,
    ) -> Option<()> {
        frame.store(
            l3,
            Header {
                version: 0x60,
                class_and_label: [0; 3],
                payload_length: length.to_be_bytes(),
                next: proto,
                hop_limit: 64,
                src: *src,
                dst: *dst,
            },
        )
    }

    #[inline(always)]
    fn total_length<P: Frame>(frame: &P, l3: usize) -> Option<usize> {
        let header: Header = frame.load(l3)?;
        Some(usize::from(u16::from_be_bytes(header.payload_length)) + Self::HEADER)
    }
}
