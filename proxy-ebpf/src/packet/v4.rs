//! IPv4 (RFC 791).

use bytemuck::{Pod, Zeroable};
use proxy_common::checksum::Delta;
use proxy_common::tables::{FlowKey, Packet, Part, Side};
use proxy_common::{Addr4, V4, proto};

use super::{Frame, Plain, REACH, Window, Wire, plain_transport, tcp};

/// The fixed header.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    version_ihl: u8,
    tos: u8,
    total_length: [u8; 2],
    id: u16,
    fragment: [u8; 2],
    ttl: u8,
    proto: u8,
    checksum: u16,
    src: Addr4,
    dst: Addr4,
}

/// ICMP's type of a redirect.
const REDIRECT: u8 = 5;
/// The time to live, and the protocol behind it.
const TTL: usize = 8;
const CHECKSUM: usize = 10;
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

impl Wire for V4 {
    const HEADER: usize = 20;
    const SOURCE: usize = 12;
    const MAX_QUOTE: usize = 60 + 8;
    const PORT_UNREACHABLE: [u8; 2] = [3, 3];
    const ECHO: [u8; 2] = [8, 0];

    #[inline(always)]
    fn headers<P: Frame>(frame: &mut P, l3: usize, key: &mut FlowKey<Self>) -> Option<Packet> {
        let header: Header = frame.load(l3)?;
        (key.src, key.dst) = (header.src, header.dst);
        let length = usize::from(header.version_ihl & 0x0f) * 4;
        if header.version_ihl >> 4 != 4 || length < Self::HEADER {
            return None;
        }
        let fragment = u16::from_be_bytes(header.fragment);
        let part = if fragment & FRAGMENT_OFFSET != 0 {
            Part::Later
        } else if fragment & MORE_FRAGMENTS != 0 {
            Part::First
        } else {
            Part::Whole
        };
        if length > Self::HEADER {
            frame.want(REACH);
        }
        Some(Packet {
            l4: (l3 + length) as u32,
            id: u32::from(header.id),
            proto: header.proto,
            flags: 0,
            part: part as u8,
            pad: 0,
        })
    }

    #[inline(always)]
    fn plain<P: Frame>(frame: &mut P, side: Side) -> Option<(Plain, FlowKey<Self>)> {
        frame.want(P::NETWORK + Self::HEADER + size_of::<tcp::Header>());
        let header: Header = frame.headers(Self::HEADER)?.load(0)?;
        let fragment = u16::from_be_bytes(header.fragment) & (MORE_FRAGMENTS | FRAGMENT_OFFSET);
        let is_plain = header.version_ihl == 0x45
            && fragment == 0
            && header.ttl > 1
            && matches!(header.proto, proto::TCP | proto::UDP);
        if !is_plain {
            return None;
        }
        let (plain, ports) = plain_transport::<Self, P>(frame, header.proto)?;
        let mut key = FlowKey::zeroed();
        key.set_addresses(header.src, header.dst);
        key.set_ports(bytemuck::cast(ports), header.proto, side);
        Some((plain, key))
    }

    /// Destination unreachable, time exceeded, parameter problem.
    #[inline(always)]
    fn is_error(icmp_type: u8) -> bool {
        matches!(icmp_type, 3 | 11 | 12)
    }

    #[inline(always)]
    fn redirected<P: Frame>(frame: &P, l4: usize) -> Option<usize> {
        let [kind, _]: [u8; 2] = frame.load(l4)?;
        (kind == REDIRECT).then_some(8)
    }

    #[inline(always)]
    fn set_addresses<W: Window>(
        window: &mut W,
        new: (&Addr4, &Addr4),
        change: Delta,
    ) -> Option<()> {
        window.store(CHECKSUM, change.apply(window.load(CHECKSUM)?))?;
        window.store(Self::SOURCE, [*new.0, *new.1])
    }

    #[inline(always)]
    fn hop<P: Frame>(frame: &mut P, l3: usize) -> Option<()> {
        let old: [u8; 2] = frame.load(l3 + TTL)?;
        if old[0] <= 1 {
            return None;
        }
        let new = [old[0] - 1, old[1]];
        let delta = Delta::default().half(u16::from_ne_bytes(old), u16::from_ne_bytes(new));
        let checksum: u16 = frame.load(l3 + CHECKSUM)?;
        frame.store(l3 + CHECKSUM, delta.apply(checksum))?;
        frame.store(l3 + TTL, new)
    }

    #[inline(always)]
    fn write_header<P: Frame>(
        frame: &mut P,
        l3: usize,
        (src, dst): (&Addr4, &Addr4),
        proto: u8,
        length: u16,
    ) -> Option<()> {
        let mut header = Header {
            version_ihl: 0x45,
            tos: 0,
            total_length: (length + 20).to_be_bytes(),
            id: 0,
            fragment: [0x40, 0],
            ttl: 64,
            proto,
            checksum: 0,
            src: *src,
            dst: *dst,
        };
        let words: [u16; 10] = bytemuck::cast(header);
        let mut sum = Delta::default();
        for word in words {
            sum = sum.half(0xffff, word);
        }
        header.checksum = !sum.fold();
        frame.store(l3, header)
    }

    #[inline(always)]
    fn total_length<P: Frame>(frame: &P, l3: usize) -> Option<usize> {
        let header: Header = frame.load(l3)?;
        Some(usize::from(u16::from_be_bytes(header.total_length)))
    }
}
