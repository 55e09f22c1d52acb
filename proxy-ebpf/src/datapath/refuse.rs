//! Answers to what no backend serves: TCP gets a reset (RFC 9293, 3.10.7.1), anything else ICMP "port
//! unreachable" (KP-70, KP-72). The answer is made from the packet itself and goes back out of its link.
//!
//! kube-proxy answers TCP with ICMP too; a reset reaches clients whose firewall drops ICMP
//! (docs/conformance.md, KP-72).

use proxy_common::checksum::Delta;
use proxy_common::tables::{FlowKey, Part, Work};
use proxy_common::{Address, Family, Outcome, proto};

use super::rewrite;
use crate::packet::{Frame, Wire, tcp};

/// The length of the ICMP header that is put in front of a quoted packet.
const ICMP_HEADER: usize = 8;

/// Turns the packet into its refusal.
#[inline(always)]
pub fn refuse<F: Wire, P: Frame>(frame: &mut P, work: &Work<F>) -> Outcome {
    // Only the first fragment has what an answer needs, and one answer is enough.
    if work.packet.is(Part::Later) || work.packet.flags & tcp::RST != 0 {
        return Outcome::Silent;
    }
    let (written, outcome) = if work.packet.proto == proto::TCP {
        (reset(frame, work), Outcome::Reset)
    } else {
        (explain(frame, work, F::PORT_UNREACHABLE, 0), Outcome::Unreachable)
    };
    match written.and_then(|()| rewrite::turn_around(frame)) {
        Some(()) => outcome,
        None => Outcome::NotWritable,
    }
}

/// A reset from the VIP, behind a fresh IP header without options.
#[inline(always)]
fn reset<F: Wire, P: Frame>(frame: &mut P, work: &Work<F>) -> Option<()> {
    let segment: tcp::Header = frame.load(work.packet.l4())?;
    let mut answer = tcp::Header {
        sport: segment.dport,
        dport: segment.sport,
        sequence: segment.acknowledgement,
        acknowledgement: [0; 4],
        offset: 5 << 4,
        flags: tcp::RST,
        window: [0; 2],
        checksum: 0,
        urgent: [0; 2],
    };
    if work.packet.flags & tcp::ACK == 0 {
        let sequence = u32::from_be_bytes(segment.sequence);
        let end = sequence.wrapping_add(tcp::sequence_length::<F, P>(frame, &work.packet)?);
        answer.sequence = [0; 4];
        answer.acknowledgement = end.to_be_bytes();
        answer.flags = tcp::RST | tcp::ACK;
    }
    self::answer(frame, &work.key, answer)
}

/// Puts a segment without data, whose checksum is yet to be made, in the place of the packet that it answers.
#[inline(always)]
pub fn answer<F: Wire, P: Frame>(
    frame: &mut P,
    key: &FlowKey<F>,
    mut answer: tcp::Header,
) -> Option<()> {
    let words: [u16; 10] = bytemuck::cast(answer);
    answer.checksum = !(pseudo_header(key, proto::TCP, 20) + sum(words)).fold();
    let l4 = P::NETWORK + F::HEADER;
    frame.resize(l4 + size_of::<tcp::Header>())?;
    write_header(frame, key, proto::TCP, 20)?;
    frame.store(l4, answer)
}

/// An ICMP error from the VIP, quoting the packet's headers; `detail` is what lies behind its checksum.
#[inline(always)]
fn explain<F: Wire, P: Frame>(
    frame: &mut P,
    work: &Work<F>,
    [kind, code]: [u8; 2],
    detail: u32,
) -> Option<()> {
    let quote = work.packet.l4() + 8 - P::NETWORK;
    if quote > F::MAX_QUOTE {
        return None;
    }
    let length = ICMP_HEADER + quote;
    let icmp = P::NETWORK + F::HEADER;
    frame.resize(icmp + length)?;
    let quoted = move_quote::<F, P>(frame, quote)?;
    write_header(frame, &work.key, F::ICMP, length as u16)?;
    let [high, low] = halves(detail);
    let header = [u16::from_ne_bytes([kind, code]), 0, high, low];
    let mut total = quoted.half(0xffff, header[0]).half(0xffff, high).half(0xffff, low);
    if F::ICMP != proto::ICMP {
        total = total + pseudo_header(&work.key, F::ICMP, length as u16);
    }
    frame.store(icmp, [header[0], !total.fold(), high, low])
}

/// A number as two halves of a packet, in network byte order.
#[inline(always)]
const fn halves(number: u32) -> [u16; 2] {
    let [a, b, c, d] = number.to_be_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}

/// Moves the packet's first `quote` bytes behind the place of the new headers and sums them up. From
/// the end on, because the two places overlap. Headers end at a multiple of four bytes.
#[inline(always)]
fn move_quote<F: Wire, P: Frame>(frame: &mut P, quote: usize) -> Option<Delta> {
    let mut total = Delta::default();
    let words = F::MAX_QUOTE / 4;
    for position in 0..words {
        let offset = (words - 1 - position) * 4;
        if offset >= quote {
            continue;
        }
        let word: u32 = frame.load(P::NETWORK + offset)?;
        frame.store(P::NETWORK + F::HEADER + ICMP_HEADER + offset, word)?;
        total = total.word(0xffff_ffff, word);
    }
    Some(total)
}

/// A fresh header for an answer from the packet's destination to its source.
#[inline(always)]
fn write_header<F: Wire, P: Frame>(
    frame: &mut P,
    key: &FlowKey<F>,
    number: u8,
    length: u16,
) -> Option<()> {
    F::write_header(frame, P::NETWORK, (&key.dst, &key.src), number, length)
}

/// The sum of the pseudo header (RFC 9293, RFC 8200 section 8.1) of an answer to the packet.
#[inline(always)]
fn pseudo_header<F: Family>(key: &FlowKey<F>, number: u8, length: u16) -> Delta {
    let zero: F::Addr = bytemuck::Zeroable::zeroed();
    // A delta from zero counts one's complement zeros, which are nothing: 0xffff for each word.
    let addresses = zero.delta(key.src) + zero.delta(key.dst);
    addresses.half(0xffff, length.to_be()).half(0xffff, u16::from(number).to_be())
}

#[inline(always)]
fn sum(words: [u16; 10]) -> Delta {
    let mut total = Delta::default();
    for word in words {
        total = total.half(0xffff, word);
    }
    total
}
