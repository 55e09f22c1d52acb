//! Flows from their first packet to their last, and what is none.

use std::net::SocketAddr;

use super::{
    ACK, Becomes, Cast, FIN, Hook, RST, SYN, Service, Step, hook, packet, reply, request,
    translated,
};
use crate::tables::Side::{Egress, Ingress};
use crate::testing::packets::{Packet, Transport};
use crate::{Outcome, proto};

pub fn connection(cast: &Cast) -> Vec<Step> {
    vec![
        cast.serve(&[cast.pod]),
        request(cast, SYN, Outcome::Opened),
        request(cast, SYN, Outcome::Forwarded),
        reply(cast, SYN | ACK, Outcome::Replied),
        request(cast, SYN, Outcome::Forwarded),
        request(cast, ACK, Outcome::Established),
        reply(cast, ACK, Outcome::Replied),
        request(cast, ACK, Outcome::Forwarded),
        request(cast, FIN | ACK, Outcome::Forwarded),
        reply(cast, ACK, Outcome::Replied),
        reply(cast, FIN | ACK, Outcome::Replied),
        request(cast, ACK, Outcome::Forwarded),
    ]
}

pub fn reset_connection(cast: &Cast) -> Vec<Step> {
    vec![
        cast.serve(&[cast.pod]),
        request(cast, SYN, Outcome::Opened),
        reply(cast, SYN | ACK, Outcome::Replied),
        request(cast, ACK, Outcome::Established),
        request(cast, RST, Outcome::Forwarded),
        request(cast, SYN, Outcome::Opened),
        reply(cast, SYN | ACK, Outcome::Replied),
    ]
}

pub fn port_reuse(cast: &Cast) -> Vec<Step> {
    let mut steps = connection(cast);
    steps.extend([
        cast.serve(&[cast.other_pod]),
        request(&Cast { pod: cast.other_pod, ..*cast }, SYN, Outcome::Opened),
        reply(&Cast { pod: cast.other_pod, ..*cast }, SYN | ACK, Outcome::Replied),
    ]);
    steps
}

pub fn datagrams(cast: &Cast) -> Vec<Step> {
    let there = Packet::udp(Ingress, cast.client, cast.vip);
    let arrived = Packet { dst: cast.pod, ..there.clone() };
    let back = Packet::udp(Egress, cast.pod, cast.client).with_payload(b"odd");
    let returned = Packet { src: cast.vip, ..back.clone() };
    vec![
        cast.serve(&[cast.pod]),
        translated(&there, Outcome::Opened, &arrived),
        translated(&there, Outcome::Forwarded, &arrived),
        translated(&back, Outcome::Replied, &returned),
        translated(&back, Outcome::Replied, &returned),
        translated(&there, Outcome::Established, &arrived),
        translated(&back, Outcome::Replied, &returned),
        translated(&there, Outcome::Forwarded, &arrived),
    ]
}

/// Of any length, summed or not, and to a backend that was withdrawn (KP-112).
pub fn sctp(cast: &Cast) -> Vec<Step> {
    let serve = |pod| {
        let there = Service::new(cast.vip, proto::SCTP, &[pod]);
        let elsewhere = Service::new(cast.other_vip, proto::SCTP, &[cast.pod]);
        Step::Services(vec![there, elsewhere])
    };
    let chunk = |side, src, dst, length| {
        let packet = Packet::udp(side, src, dst).with_payload(&vec![7; length]);
        Packet { transport: Transport::Sctp, ..packet }
    };
    let there = |length| chunk(Ingress, cast.client, cast.vip, length);
    let back = |length| chunk(Egress, cast.pod, cast.client, length);
    let arrives = |sent: Packet, outcome| {
        translated(&sent, outcome, &Packet { dst: cast.pod, ..sent.clone() })
    };
    let returns = |sent: Packet, outcome| {
        translated(&sent, outcome, &Packet { src: cast.vip, ..sent.clone() })
    };
    let unsummed = Packet { transport: Transport::SctpUnsummed, ..there(20) };
    vec![
        serve(cast.pod),
        arrives(there(20), Outcome::Opened),
        returns(back(16), Outcome::Replied),
        arrives(there(0), Outcome::Established),
        arrives(there(1).with_options(), Outcome::Forwarded),
        arrives(there(1300), Outcome::Forwarded),
        arrives(unsummed, Outcome::Forwarded),
        returns(back(1001), Outcome::Replied),
        serve(cast.other_pod),
        arrives(there(21), Outcome::Forwarded),
    ]
}

/// The start of an answered flow by UDP: client to VIP to pod and back.
pub fn answered(cast: &Cast) -> Vec<Step> {
    datagrams(cast).into_iter().take(6).collect()
}

pub fn unsummed(cast: &Cast) -> Vec<Step> {
    let bare = |packet| Packet { transport: Transport::UdpUnsummed, ..packet };
    let there = bare(Packet::udp(Ingress, cast.client, cast.vip));
    let back = bare(Packet::udp(Egress, cast.pod, cast.client));
    vec![
        cast.serve(&[cast.pod]),
        translated(&there, Outcome::Opened, &Packet { dst: cast.pod, ..there.clone() }),
        translated(&back, Outcome::Replied, &Packet { src: cast.vip, ..back.clone() }),
    ]
}

pub fn options(cast: &Cast) -> Vec<Step> {
    let there = Packet::tcp(Ingress, cast.client, cast.vip, SYN).with_options();
    let back = Packet::tcp(Egress, cast.pod, cast.client, SYN | ACK).with_options();
    vec![
        cast.serve(&[cast.pod]),
        translated(&there, Outcome::Opened, &Packet { dst: cast.pod, ..there.clone() }),
        translated(&back, Outcome::Replied, &Packet { src: cast.vip, ..back.clone() }),
    ]
}

pub fn fragments(cast: &Cast) -> Vec<Step> {
    let pieces = |packet: &Packet| packet.fragments(24);
    let step = |side, frame: &[u8], outcome, becomes: &[u8]| Step::Packet {
        hook: hook(side),
        frame: frame.to_vec(),
        outcome,
        becomes: Becomes::This(becomes.to_vec()),
    };
    let there = Packet::udp(Ingress, cast.client, cast.vip).with_payload(&[7; 100]);
    let arrived = Packet { dst: cast.pod, ..there.clone() };
    let back = Packet::udp(Egress, cast.pod, cast.client).with_payload(&[8; 100]);
    let returned = Packet { src: cast.vip, ..back.clone() };
    let ([first, later], [first_there, later_there]) = (pieces(&there), pieces(&arrived));
    let ([answer, rest], [answer_there, rest_there]) = (pieces(&back), pieces(&returned));
    let lost = Step::Packet {
        hook: Hook::Ingress,
        frame: later.clone(),
        outcome: Outcome::FragmentUnknown,
        becomes: Becomes::Nothing,
    };
    let foreign = Packet::udp(Ingress, cast.client, cast.pod).with_payload(&[9; 100]);
    let untouched = Step::Packet {
        hook: Hook::Ingress,
        frame: pieces(&foreign)[1].clone(),
        outcome: Outcome::NotService,
        becomes: Becomes::Same,
    };
    vec![
        cast.serve(&[cast.pod]),
        lost,
        untouched,
        step(Ingress, &first, Outcome::Opened, &first_there),
        step(Ingress, &later, Outcome::Fragment, &later_there),
        step(Egress, &answer, Outcome::Replied, &answer_there),
        step(Egress, &rest, Outcome::Fragment, &rest_there),
        step(Ingress, &later, Outcome::Fragment, &later_there),
    ]
}

/// The pod sees the VIP as its client, and its answer comes back to the same hook.
pub fn hairpin(cast: &Cast) -> Vec<Step> {
    let (own, me) = (cast.pod, SocketAddr::new(cast.pod.ip(), 40_000));
    let seen_as = SocketAddr::new(cast.vip.ip(), me.port());
    let turned = |packet: &Packet, src, dst| Packet { side: Egress, src, dst, ..packet.clone() };
    let there = Packet::tcp(Ingress, me, cast.vip, SYN);
    let back = Packet::tcp(Ingress, own, seen_as, SYN | ACK);
    let more = Packet::tcp(Ingress, me, cast.vip, ACK);
    vec![
        cast.serve(&[own]),
        translated(&there, Outcome::Hairpin, &turned(&there, seen_as, own)),
        translated(&back, Outcome::Hairpin, &turned(&back, cast.vip, me)),
        translated(&more, Outcome::Hairpin, &turned(&more, seen_as, own)),
    ]
}

pub fn two_vips(cast: &Cast) -> Vec<Step> {
    let service = |frontend| Service::new(frontend, proto::UDP, &[cast.pod]);
    let first = Packet::udp(Ingress, cast.client, cast.vip);
    let second = Packet::udp(Ingress, cast.client, cast.other_vip);
    let arrived = |sent: &Packet| Packet { dst: cast.pod, ..sent.clone() };
    vec![
        Step::Services([cast.vip, cast.other_vip].map(service).into()),
        translated(&first, Outcome::Opened, &arrived(&first)),
        packet(&second, Outcome::Opened, Becomes::OtherSourcePort(arrived(&second))),
        packet(&second, Outcome::Forwarded, Becomes::OtherSourcePort(arrived(&second))),
        translated(&first, Outcome::Forwarded, &arrived(&first)),
    ]
}

pub fn withdrawn(cast: &Cast) -> Vec<Step> {
    let there = Packet::udp(Ingress, cast.client, cast.vip);
    let mut steps = answered(cast);
    steps.extend([
        request(cast, SYN, Outcome::Opened),
        reply(cast, SYN | ACK, Outcome::Replied),
        request(cast, ACK, Outcome::Established),
        cast.serve(&[cast.other_pod]),
        request(cast, ACK, Outcome::Forwarded),
        reply(cast, ACK, Outcome::Replied),
        translated(&there, Outcome::Opened, &Packet { dst: cast.other_pod, ..there.clone() }),
        // Anybody may send a SYN: it ends nothing that is being heard of.
        request(cast, SYN, Outcome::Forwarded),
    ]);
    steps
}

pub fn refused_by_backend(cast: &Cast) -> Vec<Step> {
    vec![
        cast.serve(&[cast.pod]),
        request(cast, SYN, Outcome::Opened),
        reply(cast, RST | ACK, Outcome::Replied),
        request(cast, SYN, Outcome::Opened),
    ]
}

pub fn malformed(cast: &Cast) -> Vec<Step> {
    let good = Packet::tcp(Ingress, cast.client, cast.vip, SYN).frame();
    let broken = |change: fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        let (outcome, becomes) = (Outcome::Malformed, Becomes::Same);
        Step::Packet { hook: Hook::Ingress, frame, outcome, becomes }
    };
    let header = if cast.vip.is_ipv4() { 20 } else { 40 };
    let short = |length| Step::Packet {
        hook: Hook::Ingress,
        frame: good[..length].to_vec(),
        outcome: Outcome::Malformed,
        becomes: Becomes::Same,
    };
    vec![
        cast.serve(&[cast.pod]),
        broken(|frame| frame[14] = 0x50 | frame[14] & 0x0f),
        short(14 + header + 3),
        short(14 + header + 12),
    ]
}

pub fn other_traffic(cast: &Cast) -> Vec<Step> {
    let same = |sent: &Packet| packet(sent, Outcome::NotService, Becomes::Same);
    let echo = |side, src: SocketAddr, dst: SocketAddr| {
        let head = if cast.vip.is_ipv4() { [8, 0] } else { [128, 0] };
        Packet::icmp(side, src.ip(), dst.ip(), head, vec![1; 16])
    };
    let unknown = Packet::udp(Egress, cast.client, cast.pod).quoted(60);
    let too_big = if cast.vip.is_ipv4() { [3, 4] } else { [2, 0] };
    vec![
        cast.serve(&[cast.pod]),
        same(&Packet::tcp(Ingress, cast.client, cast.pod, SYN)),
        same(&Packet::udp(Ingress, cast.client, cast.other_vip)),
        same(&Packet::tcp(Egress, cast.pod, cast.client, SYN | ACK)),
        same(&Packet::udp(Egress, cast.vip, cast.client)),
        same(&echo(Ingress, cast.client, cast.pod)),
        same(&echo(Egress, cast.pod, cast.client)),
        same(&Packet::icmp(Egress, cast.router, cast.client.ip(), too_big, unknown)),
        same(&Packet::icmp(Ingress, cast.client.ip(), cast.pod.ip(), too_big, vec![0; 8])),
    ]
}
