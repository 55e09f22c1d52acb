//! What is refused, and ICMP errors about flows.

use std::net::SocketAddr;

use super::flows::answered;
use super::{ACK, Becomes, Cast, FIN, Hook, RST, SYN, Step, packet, request, translated};
use crate::Outcome;
use crate::tables::Side::{Egress, Ingress};
use crate::testing::packets::{Packet, Transport};

/// The reset that answers a segment.
fn reset_of(sent: &Packet) -> Packet {
    let Transport::Tcp { flags, sequence, acknowledgement, .. } = sent.transport else {
        panic!("only TCP is reset")
    };
    let (src, dst) = (sent.dst, sent.src);
    let end = sequence + u32::try_from(sent.payload.len()).expect("it is short");
    let end = end + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let transport = if flags & ACK != 0 {
        Transport::Tcp { flags: RST, sequence: acknowledgement, acknowledgement: 0, window: 0 }
    } else {
        Transport::Tcp { flags: RST | ACK, sequence: 0, acknowledgement: end, window: 0 }
    };
    Packet { side: Egress, src, dst, transport, options: false, hops: 64, payload: Vec::new() }
}

/// The message that answers anything else: it quotes the headers, and eight bytes behind them.
fn unreachable_of(sent: &Packet) -> Packet {
    let (head, length) = match (sent.src.is_ipv4(), sent.options) {
        (true, false) => ([3, 3], 20 + 8),
        (true, true) => ([3, 3], 28 + 8),
        (false, false) => ([1, 4], 40 + 8),
        (false, true) => ([1, 4], 64 + 8),
    };
    Packet::icmp(Egress, sent.dst.ip(), sent.src.ip(), head, sent.quoted(length))
}

fn refused(sent: &Packet) -> Step {
    if matches!(sent.transport, Transport::Tcp { .. }) {
        translated(sent, Outcome::Reset, &reset_of(sent))
    } else {
        translated(sent, Outcome::Unreachable, &unreachable_of(sent))
    }
}

pub fn no_endpoint(cast: &Cast) -> Vec<Step> {
    vec![
        cast.serve(&[]),
        refused(&Packet::tcp(Ingress, cast.client, cast.vip, SYN)),
        refused(&Packet::udp(Ingress, cast.client, cast.vip)),
        cast.serve(&[cast.pod]),
        request(cast, SYN, Outcome::Opened),
    ]
}

pub fn unused_port(cast: &Cast) -> Vec<Step> {
    let unused = SocketAddr::new(cast.vip.ip(), 81);
    let sctp = Packet { transport: Transport::Sctp, ..Packet::udp(Ingress, cast.client, cast.vip) };
    vec![
        cast.serve(&[cast.pod]),
        refused(&Packet::tcp(Ingress, cast.client, unused, SYN)),
        refused(&Packet::udp(Ingress, cast.client, unused)),
        refused(&sctp),
    ]
}

/// Segments with an acknowledgement, with data, with options; and what gets no answer.
pub fn refusals(cast: &Cast) -> Vec<Step> {
    let tcp = |flags| Packet::tcp(Ingress, cast.client, cast.vip, flags);
    let first_piece = Packet::udp(Ingress, cast.client, cast.vip).with_payload(&[1; 64]);
    let [first, later] = first_piece.fragments(24);
    let silent = |frame: Vec<u8>, outcome| Step::Packet {
        hook: Hook::Ingress,
        frame,
        outcome,
        becomes: Becomes::Nothing,
    };
    vec![
        cast.serve(&[]),
        refused(&tcp(ACK)),
        refused(&tcp(FIN | ACK)),
        refused(&tcp(FIN)),
        refused(&tcp(SYN).with_options()),
        refused(&Packet::udp(Ingress, cast.client, cast.vip).with_options()),
        refused(&Packet::udp(Ingress, cast.client, cast.vip).with_payload(b"")),
        silent(tcp(RST).frame(), Outcome::Silent),
        silent(later, Outcome::FragmentUnknown),
        Step::Packet {
            hook: Hook::Ingress,
            frame: first,
            outcome: Outcome::Unreachable,
            becomes: Becomes::Nothing,
        },
    ]
}

pub fn ping(cast: &Cast) -> Vec<Step> {
    let [request, answer] = if cast.vip.is_ipv4() { [8, 0] } else { [128, 129] };
    let echo = |side, src: SocketAddr, dst: SocketAddr, kind, payload: &[u8]| {
        Packet::icmp(side, src.ip(), dst.ip(), [kind, 0], payload.to_vec())
    };
    let mut steps = vec![cast.serve(&[cast.pod])];
    for payload in [&b"abcdefgh"[..], b"odd"] {
        let asked = echo(Ingress, cast.client, cast.vip, request, payload);
        let answered = echo(Egress, cast.vip, cast.client, answer, payload);
        steps.push(translated(&asked, Outcome::EchoReply, &answered));
        steps.push(translated(&asked.with_options(), Outcome::EchoReply, &answered.with_options()));
    }
    for other in [cast.pod, cast.other_vip, SocketAddr::new(cast.node, 0)] {
        let asked = echo(Ingress, cast.client, other, request, b"abcdefgh");
        steps.push(packet(&asked, Outcome::NotService, Becomes::Same));
    }
    steps
}

/// "Too big" about what went to the pod. The client must know it as what it sent to the VIP.
pub fn router_error(cast: &Cast) -> Vec<Step> {
    let head = if cast.vip.is_ipv4() { [3, 4] } else { [2, 0] };
    let sent = Packet::udp(Ingress, cast.client, cast.vip);
    let error = |quoted: &Packet, length| {
        Packet::icmp(Egress, cast.router, cast.client.ip(), head, quoted.quoted(length))
    };
    let passed = Packet { dst: cast.pod, ..sent.clone() };
    let step =
        |length| translated(&error(&passed, length), Outcome::IcmpError, &error(&sent, length));
    let mut steps = answered(cast);
    steps.push(step(1000));
    if cast.vip.is_ipv4() {
        // Header and eight bytes are all that RFC 792 asks for.
        steps.push(step(28));
    }
    // The same for a flow in the making, and for TCP.
    let syn = Packet::tcp(Ingress, cast.client, cast.vip, SYN);
    let passed = Packet { dst: cast.pod, ..syn.clone() };
    steps.push(request(cast, SYN, Outcome::Opened));
    steps.push(translated(&error(&passed, 1000), Outcome::IcmpError, &error(&syn, 1000)));
    steps
}

/// The pod's own "port unreachable" comes from the VIP, as far as the client can see.
pub fn pod_error(cast: &Cast) -> Vec<Step> {
    let head = if cast.vip.is_ipv4() { [3, 3] } else { [1, 4] };
    let sent = Packet::udp(Ingress, cast.client, cast.vip);
    let passed = Packet { dst: cast.pod, ..sent.clone() };
    let error = |from: SocketAddr, quoted: &Packet| {
        Packet::icmp(Egress, from.ip(), cast.client.ip(), head, quoted.quoted(1000))
    };
    vec![
        cast.serve(&[cast.pod]),
        translated(&sent, Outcome::Opened, &passed),
        translated(&error(cast.pod, &passed), Outcome::IcmpError, &error(cast.vip, &sent)),
    ]
}

/// The client complains about an answer, to the VIP that it came from. The pod must know it.
pub fn client_error(cast: &Cast) -> Vec<Step> {
    let head = if cast.vip.is_ipv4() { [3, 3] } else { [1, 4] };
    let answer = Packet::udp(Egress, cast.pod, cast.client);
    let seen = Packet { src: cast.vip, ..answer.clone() };
    let error = |to: SocketAddr, quoted: &Packet| {
        Packet::icmp(Ingress, cast.client.ip(), to.ip(), head, quoted.quoted(1000))
    };
    let mut steps = answered(cast);
    steps.push(translated(&error(cast.vip, &seen), Outcome::IcmpError, &error(cast.pod, &answer)));
    steps
}
