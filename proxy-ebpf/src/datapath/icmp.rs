//! ICMP errors about a flow's packets (KP-46): rewritten outside and in, so that the one who sent the
//! packet recognises it. Path MTU discovery through a VIP works by this.
//!
//! The error quotes a packet that went the other way. Its addresses, turned around, are the key of
//! the direction in which the error itself travels; that record's other key is what the receiver of
//! the error had sent.

use proxy_common::checksum::Delta;
use proxy_common::tables::{Origin, Packet, Part, ServiceKey, ServiceValue, Side, State, Work};
use proxy_common::{Address, Outcome, Port, proto};

use super::{Tables, pending, rewrite};
use crate::packet::{Frame, REACH, Wire, forget, has_ports, tcp};

/// The length of ICMP's header, behind which the quoted packet begins.
const HEADER: usize = 8;
/// Where ICMP's checksum lies.
const CHECKSUM: usize = 2;

/// An ICMP packet: answered if it asks a VIP whether it is there, otherwise as [`error`] has it. Its headers have been
/// parsed.
#[inline(always)]
pub fn tell<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
) -> Outcome {
    let [request, reply] = F::ECHO;
    let is_request = frame.load::<[u8; 2]>(work.packet.l4()) == Some([request, 0]);
    if !is_request || !work.packet.is(Part::Whole) || tables.setting(|s| &s.vip_ping) == 0 {
        return error(frame, tables, work);
    }
    // Where it leaves, the answer has to come in again.
    if work.key.side == Side::Egress as u8 && tables.setting(|s| &s.catch_all) == 0 {
        return Outcome::NotService;
    }
    match tables.service(&ServiceKey::mark(work.key.dst)) {
        // ClusterIPs are nobody's. Other VIPs may be a machine's address, which answers or is down.
        Some(mark) if mark.has(ServiceValue::REFUSES) && !mark.has(ServiceValue::NODE) => {
            match echo(frame, work, request, reply) {
                Some(()) => Outcome::EchoReply,
                None => Outcome::NotWritable,
            }
        }
        _ => Outcome::NotService,
    }
}

/// Turns a request into its answer. Swapped addresses leave every sum as it is.
#[inline(always)]
fn echo<F: Wire, P: Frame>(frame: &mut P, work: &Work<F>, request: u8, answer: u8) -> Option<()> {
    let (src, dst) = (&work.key.src, &work.key.dst);
    F::set_addresses(&mut frame.headers(F::HEADER)?, (dst, src), Delta::default())?;
    frame.store(work.packet.l4(), [answer, 0])?;
    let head = |kind| u16::from_ne_bytes([kind, 0]);
    let body = Delta::default().half(head(request), head(answer));
    frame.fix_l4::<F>(work.packet.l4() + CHECKSUM, Delta::default(), body, false)?;
    rewrite::turn_around(frame)
}

/// An ICMP packet: translated if it is an error about a flow, left alone otherwise.
#[inline(always)]
fn error<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
) -> Outcome {
    match find(frame, tables, work) {
        Some((_, Message::Redirect)) => Outcome::Silent,
        Some((origin, Message::Error)) => match translate(frame, work) {
            Some(()) if origin.is(Origin::TURN) => rewrite::turn(frame),
            Some(()) => Outcome::IcmpError,
            None => Outcome::NotWritable,
        },
        None => Outcome::NotService,
    }
}

/// What an ICMP message says of the packet that it quotes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Message {
    /// It did not arrive.
    Error,
    /// There is a better way, to a backend that the client does not know: it would take it for its own way there.
    /// Netfilter's NAT drops that, too.
    Redirect,
}

/// The flow of the packet that the error quotes. What the receiver of the error had sent is then in
/// `work.other`.
#[inline(always)]
fn find<F: Wire, P: Frame, T: Tables<F>>(
    frame: &mut P,
    tables: &T,
    work: &mut Work<F>,
) -> Option<(Origin, Message)> {
    if !work.packet.is(Part::Whole) {
        return None;
    }
    let [icmp_type, _] = frame.load::<[u8; 2]>(work.packet.l4())?;
    let message = if F::is_error(icmp_type) {
        read_quoted(frame, work, HEADER)?;
        Message::Error
    } else {
        frame.want(REACH);
        let header = F::redirected(frame, work.packet.l4())?;
        read_quoted(frame, work, header)?;
        Message::Redirect
    };
    let quoted = &work.memory.spare;
    let facts = pending::known(tables, quoted, &mut work.other)?;
    (!facts.is_in(State::Foreign)).then_some((facts.origin, message))
}

/// Reads the quoted packet and puts its addresses, turned around, into the work area. `None` if there
/// are none.
#[inline(always)]
fn read_quoted<F: Wire, P: Frame>(frame: &mut P, work: &mut Work<F>, header: usize) -> Option<()> {
    frame.want(REACH);
    let key = &mut work.memory.spare;
    let headers = F::headers(frame, work.packet.l4() + header, key)?;
    forget(&mut work.inner, headers);
    if work.inner.is(Part::Later) || !has_ports(work.inner.proto) {
        return None;
    }
    [key.dport, key.sport] = frame.load::<[Port; 2]>(work.inner.l4())?;
    core::mem::swap(&mut key.src, &mut key.dst);
    (key.proto, key.side, key.pad) = (work.inner.proto, work.key.side, [0; 2]);
    Some(())
}

/// Gives the quoted packet the addresses with which it was sent, and the error itself the addresses
/// that go with it. An error from a router on the way keeps the router's address.
#[inline(always)]
fn translate<F: Wire, P: Frame>(frame: &mut P, work: &mut Work<F>) -> Option<()> {
    let (turned, other) = (&work.memory.spare, &work.other);
    let new_ports = [other.sport, other.dport];
    let addresses = turned.dst.delta(other.src) + turned.src.delta(other.dst);
    let ports = rewrite::ports_delta([turned.dport, turned.sport], new_ports);
    let mut quoted = frame.window(work.packet.l4() + HEADER, F::HEADER)?;
    F::set_addresses(&mut quoted, (&other.src, &other.dst), addresses)?;
    drop(quoted);
    frame.store(work.inner.l4(), new_ports)?;
    let quoted_sum = fix_quoted(frame, &work.inner, addresses + ports);
    let body = covered::<F>(addresses) + ports + quoted_sum;

    let key = &work.key;
    let source = if key.src == turned.src { &other.dst } else { &key.src };
    let change = key.src.delta(*source) + key.dst.delta(other.src);
    F::set_addresses(&mut frame.headers(F::HEADER)?, (source, &other.src), change)?;
    frame.fix_l4::<F>(work.packet.l4() + CHECKSUM, covered::<F>(change), body, false)
}

/// What changed addresses mean for ICMP's checksum. `ICMPv6`'s covers them, in the pseudo header and
/// in the quoted packet. ICMP's has no pseudo header, and in the quoted header the header's own sum
/// takes up the change.
#[inline(always)]
fn covered<F: Wire>(addresses: Delta) -> Delta {
    if F::ICMP == proto::ICMP { Delta::default() } else { addresses }
}

/// Mends the quoted transport checksum, if the quote reaches that far, and says what that changed.
#[inline(always)]
fn fix_quoted<P: Frame>(frame: &mut P, inner: &Packet, delta: Delta) -> Delta {
    let offset = match inner.proto {
        proto::TCP => tcp::CHECKSUM,
        proto::UDP => tcp::UDP_CHECKSUM,
        _ => return Delta::default(),
    };
    let Some(old) = frame.load::<u16>(inner.l4() + offset) else { return Delta::default() };
    if old == 0 && inner.proto == proto::UDP {
        return Delta::default();
    }
    let new = delta.apply(old);
    match frame.store(inner.l4() + offset, new) {
        Some(()) => Delta::default().half(old, new),
        None => Delta::default(),
    }
}
