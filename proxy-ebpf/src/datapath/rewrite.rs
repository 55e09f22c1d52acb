//! The only code that changes a packet that goes on.

use proxy_common::checksum::Delta;
use proxy_common::crc32c;
use proxy_common::tables::{Part, Side, Work};
use proxy_common::{Address, Port, proto};

use crate::packet::{Frame, Wire, tcp};

/// Where SCTP's checksum lies.
const SCTP_CHECKSUM: usize = 8;

/// Gives the packet the other direction's addresses, turned around, and mends all checksums.
#[inline(always)]
pub fn translate<F: Wire, P: Frame>(frame: &mut P, work: &Work<F>) -> Option<()> {
    let (key, other) = (&work.key, &work.other);
    F::set_addresses(frame, P::NETWORK, (&key.src, &key.dst), (&other.dst, &other.src))?;
    if work.packet.is(Part::Later) {
        return Some(());
    }
    let old = [key.sport, key.dport];
    let new = [other.dport, other.sport];
    if work.packet.proto == F::ICMP {
        return set_identifier::<F, P>(frame, work, old, new);
    }
    frame.store(work.packet.l4(), new)?;
    if work.packet.proto == proto::SCTP {
        return fix_sctp::<F, P>(frame, work, old, new);
    }
    let addresses = key.src.delta(other.dst) + key.dst.delta(other.src);
    fix_transport(frame, work.packet.l4(), work.packet.proto, addresses, ports_delta(old, new))
}

/// Gives an ICMP echo the identifier that stands for its ports: the one of the two that is not zero.
#[inline(always)]
fn set_identifier<F: Wire, P: Frame>(
    frame: &mut P,
    work: &Work<F>,
    old: [Port; 2],
    new: [Port; 2],
) -> Option<()> {
    let (key, other) = (&work.key, &work.other);
    let identifier = if key.side == Side::Ingress as u8 { new[1] } else { new[0] };
    frame.store(work.packet.l4() + F::ECHO_ID, identifier)?;
    let pseudo = if F::ICMP == proto::ICMP {
        // ICMP's covers no addresses, ICMPv6's does.
        Delta::default()
    } else {
        key.src.delta(other.dst) + key.dst.delta(other.src)
    };
    frame.fix_l4(work.packet.l4() + F::ECHO_CHECKSUM, pseudo, ports_delta(old, new), false)
}

/// Mends SCTP's checksum, which covers no addresses. A zero is left to the hardware that is to fill
/// it in. The first of several fragments does not tell how long all of them are.
#[inline(always)]
fn fix_sctp<F: Wire, P: Frame>(
    frame: &mut P,
    work: &Work<F>,
    old: [Port; 2],
    new: [Port; 2],
) -> Option<()> {
    if !work.packet.is(Part::Whole) {
        return None;
    }
    let l4 = work.packet.l4();
    let sum: [u8; 4] = frame.load(l4 + SCTP_CHECKSUM)?;
    let changed = number(old) ^ number(new);
    if sum == [0; 4] || changed == 0 {
        return Some(());
    }
    let length = (P::NETWORK + F::total_length(frame, P::NETWORK)?).wrapping_sub(l4) as u16;
    let sum = u32::from_le_bytes(sum) ^ crc32c::difference(changed, length);
    frame.store(l4 + SCTP_CHECKSUM, sum.to_le_bytes())
}

/// Two ports as the checksum sees them.
#[inline(always)]
fn number([first, second]: [Port; 2]) -> u32 {
    let ([a, b], [c, d]) = (first.octets, second.octets);
    u32::from_le_bytes([a, b, c, d])
}

/// The change of a checksum when `new` ports take the place of `old` ones.
#[inline(always)]
pub fn ports_delta(old: [Port; 2], new: [Port; 2]) -> Delta {
    Delta::default().half(old[0].word(), new[0].word()).half(old[1].word(), new[1].word())
}

/// Mends the transport checksum of TCP or UDP.
#[inline(always)]
fn fix_transport<P: Frame>(
    frame: &mut P,
    l4: usize,
    number: u8,
    addresses: Delta,
    ports: Delta,
) -> Option<()> {
    match number {
        proto::TCP => frame.fix_l4(l4 + tcp::CHECKSUM, addresses, ports, false),
        proto::UDP => frame.fix_l4(l4 + tcp::UDP_CHECKSUM, addresses, ports, true),
        _ => Some(()),
    }
}

/// Turns the frame around, so that it goes back to where it came from: the two link-layer addresses
/// change places. Links without such addresses need nothing.
#[inline(always)]
pub fn turn_around<P: Frame>(frame: &mut P) -> Option<()> {
    if P::NETWORK < 12 {
        return Some(());
    }
    let [to, from]: [[u8; 6]; 2] = frame.load(0)?;
    frame.store(0, [from, to])
}
