//! The only code that changes a packet that goes on.

use proxy_common::checksum::Delta;
use proxy_common::crc32c;
use proxy_common::tables::{FlowKey, Origin, Part, Side};
use proxy_common::{Address, Family, Outcome, Port, proto};

use super::{Leg, Verdict};
use crate::packet::{Frame, Plain, Window, Wire, tcp};

/// Where SCTP's checksum lies.
const SCTP_CHECKSUM: usize = 8;

/// Gives a packet of `key` the other direction's addresses, turned around, and mends all checksums. `l4` is
/// where its transport header begins.
#[inline(always)]
pub fn translate<F: Wire, P: Frame>(
    frame: &mut P,
    l4: usize,
    number: u8,
    part: Part,
    key: &FlowKey<F>,
    other: &FlowKey<F>,
) -> Option<()> {
    let addresses = key.src.delta(other.dst) + key.dst.delta(other.src);
    F::set_addresses(&mut frame.headers(F::HEADER)?, (&other.dst, &other.src), addresses)?;
    if part == Part::Later {
        return Some(());
    }
    let old = [key.sport, key.dport];
    let new = [other.dport, other.sport];
    if number == F::ICMP {
        let identifier = if key.side == Side::Ingress as u8 { new[1] } else { new[0] };
        return set_identifier::<F, P>(frame, l4, identifier, addresses, ports_delta(old, new));
    }
    frame.store(l4, new)?;
    if number == proto::SCTP {
        return fix_sctp::<F, P>(frame, l4, part, old, new);
    }
    fix_transport::<F, P>(frame, l4, number, addresses, ports_delta(old, new))
}

/// What a packet's checksum has to take up when it is translated.
pub struct Change {
    addresses: Delta,
    ports: Delta,
}

impl Change {
    /// The change from `key` to the other direction's addresses, turned around. `None` if the addresses change no
    /// sum, so that how a checksum takes it does not tell what else it covers.
    #[inline(always)]
    pub fn of<F: Family>(key: &FlowKey<F>, other: &FlowKey<F>) -> Option<Self> {
        let addresses = (key.src.delta(other.dst) + key.dst.delta(other.src)).folded();
        let ports = ports_delta([key.sport, key.dport], [other.dport, other.sport]);
        (!matches!(addresses.fold(), 0 | 0xffff)).then_some(Self { addresses, ports })
    }
}

/// As [`translate`], of a plain packet: with one call of the kernel and all stores at once.
#[inline(always)]
pub fn translate_plain<F: Wire, P: Frame>(
    frame: &mut P,
    plain: Plain,
    other: &FlowKey<F>,
    change: &Change,
) -> Option<()> {
    let checksum = plain.checksum as u16;
    if plain.is(proto::UDP) {
        translate_at(frame, tcp::UDP_CHECKSUM, checksum, other, change)
    } else {
        translate_at(frame, tcp::CHECKSUM, checksum, other, change)
    }
}

/// The same, of a packet whose transport header has its checksum, `before`, at `place`.
#[inline(always)]
fn translate_at<F: Wire, P: Frame>(
    frame: &mut P,
    place: usize,
    before: u16,
    other: &FlowKey<F>,
    &Change { addresses, ports }: &Change,
) -> Option<()> {
    let optional = place == tcp::UDP_CHECKSUM;
    let sum = P::NETWORK + F::HEADER + place;
    frame.fix_l4::<F>(sum, addresses, Delta::default(), optional)?;

    let mut window = frame.headers(F::HEADER + place + size_of::<u16>())?;
    F::set_addresses(&mut window, (&other.dst, &other.src), addresses)?;
    window.store::<u32>(F::HEADER, bytemuck::cast([other.dport, other.sport]))?;
    let after = window.load(F::HEADER + place)?;
    if ports != Delta::default() && covers_ports(before, after, addresses, optional) {
        window.store(F::HEADER + place, kept(ports.apply(after), optional))?;
    }
    Some(())
}

/// Whether a checksum covers ports, as its change by that of the addresses tells: one that hardware has yet to
/// finish takes that the other way, and where there is none it takes nothing.
#[inline(always)]
fn covers_ports(before: u16, after: u16, addresses: Delta, optional: bool) -> bool {
    after == kept(addresses.apply(before), optional) && !(optional && before == 0)
}

/// A checksum as it is written: where a zero means that there is none, it is the other zero.
#[inline(always)]
const fn kept(checksum: u16, optional: bool) -> u16 {
    if optional && checksum == 0 { 0xffff } else { checksum }
}

/// Gives an ICMP echo the identifier that stands for its ports: the one of the two that is not zero.
#[inline(always)]
fn set_identifier<F: Wire, P: Frame>(
    frame: &mut P,
    l4: usize,
    identifier: Port,
    addresses: Delta,
    ports: Delta,
) -> Option<()> {
    frame.store(l4 + F::ECHO_ID, identifier)?;
    // ICMP's sum covers no addresses, ICMPv6's does.
    let pseudo = if F::ICMP == proto::ICMP { Delta::default() } else { addresses };
    frame.fix_l4::<F>(l4 + F::ECHO_CHECKSUM, pseudo, ports, false)
}

/// Says which way a translated packet goes: on; or by a short cut, where it counts as a hop; or back to the pod that it came
/// from. An answer to a client outside goes on if the host stack has chosen the link that leads to him.
#[inline(always)]
pub fn send<F: Wire, P: Frame>(
    frame: &mut P,
    origin: Origin,
    Leg { link, way, .. }: Leg,
    outcome: Outcome,
) -> Verdict {
    if origin.is(Origin::SHORT_CUT) {
        return match F::hop(frame, P::NETWORK) {
            Some(()) => Verdict { outcome: Outcome::ShortCut, link, way },
            None => Verdict::of(Outcome::NotWritable),
        };
    }
    if origin.is(Origin::MASQUERADES) && origin.has_backend() && !origin.is(Origin::REPLY) {
        frame.set_led();
    }
    if link != 0 && link != frame.link() {
        return Verdict { outcome, link, way };
    }
    Verdict::of(if origin.is(Origin::TURN) { turn(frame) } else { outcome })
}

/// Sends a translated packet back to where it came from.
#[inline(always)]
pub fn turn<P: Frame>(frame: &mut P) -> Outcome {
    match turn_around(frame) {
        Some(()) => Outcome::Hairpin,
        None => Outcome::NotWritable,
    }
}

/// Whether a packet that is not a later fragment is longer than `mtu`; which is 0 if the way takes any.
#[inline(always)]
pub fn is_too_big<F: Wire, P: Frame>(frame: &P, l4: usize, number: u8, mtu: u32) -> bool {
    if mtu == 0 {
        return false;
    }
    let Some(total) = F::total_length(frame, P::NETWORK) else { return false };
    let length = match frame.segment() {
        0 => total,
        payload => {
            let Some(header) = transport_header(frame, l4, number) else { return false };
            l4 - P::NETWORK + header + payload
        }
    };
    length > mtu as usize
}

/// The length of the transport header of a packet that is cut into several.
#[inline(always)]
fn transport_header<P: Frame>(frame: &P, l4: usize, number: u8) -> Option<usize> {
    if number != proto::TCP {
        return Some(8);
    }
    let [offset, _]: [u8; 2] = frame.load(l4 + tcp::OFFSET_AND_FLAGS)?;
    Some(usize::from(offset >> 4) * 4)
}

/// Mends SCTP's checksum, which covers no addresses. A zero is left to the hardware that is to fill
/// it in. The first of several fragments does not tell how long all of them are.
#[inline(always)]
fn fix_sctp<F: Wire, P: Frame>(
    frame: &mut P,
    l4: usize,
    part: Part,
    old: [Port; 2],
    new: [Port; 2],
) -> Option<()> {
    if part != Part::Whole {
        return None;
    }
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
    let (old, new): (u32, u32) = (bytemuck::cast(old), bytemuck::cast(new));
    if old == new { Delta::default() } else { Delta::default().word(old, new) }
}

/// Mends the transport checksum of TCP or UDP.
#[inline(always)]
fn fix_transport<F: Wire, P: Frame>(
    frame: &mut P,
    l4: usize,
    number: u8,
    addresses: Delta,
    ports: Delta,
) -> Option<()> {
    match number {
        proto::TCP => frame.fix_l4::<F>(l4 + tcp::CHECKSUM, addresses, ports, false),
        proto::UDP => frame.fix_l4::<F>(l4 + tcp::UDP_CHECKSUM, addresses, ports, true),
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
