//! The datapath's cases: packets in, packets out, and under which name. The host runs them on ordinary
//! collections, the kernel on its maps.

use std::net::{IpAddr, SocketAddr};

use super::packets::{Packet, Transport};
use crate::tables::Side;
use crate::tables::Side::{Egress, Ingress};
use crate::{Outcome, proto};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// A Service port: a frontend and its backends.
#[derive(Clone, Debug)]
pub struct Service {
    /// Where clients send to.
    pub frontend: SocketAddr,
    /// The protocol's number.
    pub proto: u8,
    /// Where they get to.
    pub backends: Vec<SocketAddr>,
}

/// What a packet becomes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Becomes {
    /// It is not touched.
    Same,
    /// Exactly this.
    This(Vec<u8>),
    /// This, but for its source port, which is another one, and the checksum that goes with it.
    OtherSourcePort(Packet),
    /// It is dropped; its bytes do not matter.
    Nothing,
}

/// One step of a case.
#[derive(Clone, Debug)]
pub enum Step {
    /// From now on there are these Services and no others.
    Services(Vec<Service>),
    /// A packet is seen.
    Packet {
        /// At which hook.
        side: Side,
        /// The packet.
        frame: Vec<u8>,
        /// What is done with it.
        outcome: Outcome,
        /// What it is then.
        becomes: Becomes,
    },
}

/// A story of packets.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it shows.
    pub name: String,
    /// Its steps.
    pub steps: Vec<Step>,
}

/// A story, told with a family's addresses.
type Story = fn(&Cast) -> Vec<Step>;

/// The addresses of a family's stories.
#[derive(Clone, Copy)]
struct Cast {
    client: SocketAddr,
    vip: SocketAddr,
    other_vip: SocketAddr,
    pod: SocketAddr,
    other_pod: SocketAddr,
    router: IpAddr,
}

impl Cast {
    fn v4() -> Self {
        let at = |octets: [u8; 4], port| SocketAddr::from((octets, port));
        Self {
            client: at([10, 244, 0, 7], 40_000),
            vip: at([10, 96, 0, 10], 80),
            other_vip: at([10, 96, 0, 20], 80),
            pod: at([10, 244, 1, 8], 8080),
            other_pod: at([10, 244, 1, 9], 9090),
            router: [192, 0, 2, 1].into(),
        }
    }

    fn v6() -> Self {
        let at = |segments: [u16; 8], port| SocketAddr::from((segments, port));
        Self {
            client: at([0xfd00, 0x244, 0, 0, 0, 0, 0, 7], 40_000),
            vip: at([0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10], 80),
            other_vip: at([0xfd00, 0x96, 0, 0, 0, 0, 0, 0x20], 80),
            pod: at([0xfd00, 0x244, 1, 0, 0, 0, 0, 8], 8080),
            other_pod: at([0xfd00, 0x244, 1, 0, 0, 0, 0, 9], 9090),
            router: [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into(),
        }
    }

    /// The VIP's TCP and UDP ports, led to these pods.
    fn serve(self, backends: &[SocketAddr]) -> Step {
        let service = |proto| Service { frontend: self.vip, proto, backends: backends.to_vec() };
        Step::Services([proto::TCP, proto::UDP].map(service).into())
    }
}

fn packet(packet: &Packet, outcome: Outcome, becomes: Becomes) -> Step {
    Step::Packet { side: packet.side, frame: packet.frame(), outcome, becomes }
}

fn translated(from: &Packet, outcome: Outcome, to: &Packet) -> Step {
    packet(from, outcome, Becomes::This(to.frame()))
}

/// A TCP segment of the client and what the pod gets of it.
fn request(cast: &Cast, flags: u8, outcome: Outcome) -> Step {
    let sent = Packet::tcp(Ingress, cast.client, cast.vip, flags);
    translated(&sent, outcome, &Packet { dst: cast.pod, ..sent.clone() })
}

/// A TCP segment of the pod and what the client gets of it.
fn reply(cast: &Cast, flags: u8, outcome: Outcome) -> Step {
    let sent = Packet::tcp(Egress, cast.pod, cast.client, flags);
    translated(&sent, outcome, &Packet { src: cast.vip, ..sent.clone() })
}

/// All cases, of both families.
pub fn cases() -> Vec<Case> {
    let stories: [(&str, Story); 18] = [
        ("a connection from its SYN to its end", connection),
        ("a connection that is reset", reset_connection),
        ("a port is used again after its connection has ended", port_reuse),
        ("datagrams there and back", datagrams),
        ("IPv4 options and IPv6 extension headers are passed over", options),
        ("fragments of one datagram are rewritten alike", fragments),
        ("a pod reaches itself", hairpin),
        ("without endpoint a sender is refused", no_endpoint),
        ("a port that the VIP does not have is refused", unused_port),
        ("refusals answer what was sent", refusals),
        ("other traffic is not touched", other_traffic),
        ("an error of a router on the way back to the client", router_error),
        ("an error of the pod itself", pod_error),
        ("an error of the client about an answer", client_error),
        ("one source port through two VIPs to one pod", two_vips),
        ("a withdrawn backend keeps TCP and loses UDP", withdrawn),
        ("a backend that refuses", refused_by_backend),
        ("headers that no stack accepts", malformed),
    ];
    let mut cases = Vec::new();
    for (family, cast) in [("IPv4", Cast::v4()), ("IPv6", Cast::v6())] {
        for (name, story) in stories {
            cases.push(Case { name: format!("{family}: {name}"), steps: story(&cast) });
        }
    }
    let steps = unsummed(&Cast::v4());
    cases.push(Case { name: "IPv4: UDP without a checksum stays without".to_owned(), steps });
    cases
}

fn connection(cast: &Cast) -> Vec<Step> {
    vec![
        cast.serve(&[cast.pod]),
        request(cast, SYN, Outcome::Opened),
        request(cast, SYN, Outcome::Forwarded),
        reply(cast, SYN | ACK, Outcome::Established),
        request(cast, ACK, Outcome::Forwarded),
        reply(cast, ACK, Outcome::Replied),
        request(cast, FIN | ACK, Outcome::Forwarded),
        reply(cast, ACK, Outcome::Replied),
        reply(cast, FIN | ACK, Outcome::Replied),
        request(cast, ACK, Outcome::Forwarded),
    ]
}

fn reset_connection(cast: &Cast) -> Vec<Step> {
    vec![
        cast.serve(&[cast.pod]),
        request(cast, SYN, Outcome::Opened),
        reply(cast, SYN | ACK, Outcome::Established),
        request(cast, RST, Outcome::Forwarded),
        request(cast, SYN, Outcome::Opened),
        reply(cast, SYN | ACK, Outcome::Established),
    ]
}

fn port_reuse(cast: &Cast) -> Vec<Step> {
    let mut steps = connection(cast);
    steps.extend([
        cast.serve(&[cast.other_pod]),
        request(&Cast { pod: cast.other_pod, ..*cast }, SYN, Outcome::Opened),
        reply(&Cast { pod: cast.other_pod, ..*cast }, SYN | ACK, Outcome::Established),
    ]);
    steps
}

fn datagrams(cast: &Cast) -> Vec<Step> {
    let there = Packet::udp(Ingress, cast.client, cast.vip);
    let arrived = Packet { dst: cast.pod, ..there.clone() };
    let back = Packet::udp(Egress, cast.pod, cast.client).with_payload(b"odd");
    let returned = Packet { src: cast.vip, ..back.clone() };
    vec![
        cast.serve(&[cast.pod]),
        translated(&there, Outcome::Opened, &arrived),
        translated(&there, Outcome::Forwarded, &arrived),
        translated(&back, Outcome::Established, &returned),
        translated(&back, Outcome::Replied, &returned),
        translated(&there, Outcome::Forwarded, &arrived),
    ]
}

fn unsummed(cast: &Cast) -> Vec<Step> {
    let bare = |packet| Packet { transport: Transport::UdpUnsummed, ..packet };
    let there = bare(Packet::udp(Ingress, cast.client, cast.vip));
    let back = bare(Packet::udp(Egress, cast.pod, cast.client));
    vec![
        cast.serve(&[cast.pod]),
        translated(&there, Outcome::Opened, &Packet { dst: cast.pod, ..there.clone() }),
        translated(&back, Outcome::Established, &Packet { src: cast.vip, ..back.clone() }),
    ]
}

fn options(cast: &Cast) -> Vec<Step> {
    let there = Packet::tcp(Ingress, cast.client, cast.vip, SYN).with_options();
    let back = Packet::tcp(Egress, cast.pod, cast.client, SYN | ACK).with_options();
    vec![
        cast.serve(&[cast.pod]),
        translated(&there, Outcome::Opened, &Packet { dst: cast.pod, ..there.clone() }),
        translated(&back, Outcome::Established, &Packet { src: cast.vip, ..back.clone() }),
    ]
}

fn fragments(cast: &Cast) -> Vec<Step> {
    let pieces = |packet: &Packet| packet.fragments(24);
    let step = |side, frame: &[u8], outcome, becomes: &[u8]| Step::Packet {
        side,
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
        side: Ingress,
        frame: later.clone(),
        outcome: Outcome::FragmentUnknown,
        becomes: Becomes::Nothing,
    };
    let foreign = Packet::udp(Ingress, cast.client, cast.pod).with_payload(&[9; 100]);
    let untouched = Step::Packet {
        side: Ingress,
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
        step(Egress, &answer, Outcome::Established, &answer_there),
        step(Egress, &rest, Outcome::Fragment, &rest_there),
        step(Ingress, &later, Outcome::Fragment, &later_there),
    ]
}

/// The pod sees the VIP as its client, and its answer comes back to the same hook.
fn hairpin(cast: &Cast) -> Vec<Step> {
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
    Packet { side: Egress, src, dst, transport, options: false, payload: Vec::new() }
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

fn no_endpoint(cast: &Cast) -> Vec<Step> {
    vec![
        cast.serve(&[]),
        refused(&Packet::tcp(Ingress, cast.client, cast.vip, SYN)),
        refused(&Packet::udp(Ingress, cast.client, cast.vip)),
        cast.serve(&[cast.pod]),
        request(cast, SYN, Outcome::Opened),
    ]
}

fn unused_port(cast: &Cast) -> Vec<Step> {
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
fn refusals(cast: &Cast) -> Vec<Step> {
    let tcp = |flags| Packet::tcp(Ingress, cast.client, cast.vip, flags);
    let first_piece = Packet::udp(Ingress, cast.client, cast.vip).with_payload(&[1; 64]);
    let [first, later] = first_piece.fragments(24);
    let silent = |frame: Vec<u8>, outcome| Step::Packet {
        side: Ingress,
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
            side: Ingress,
            frame: first,
            outcome: Outcome::Unreachable,
            becomes: Becomes::Nothing,
        },
    ]
}

fn other_traffic(cast: &Cast) -> Vec<Step> {
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

/// The start of an answered flow by UDP: client to VIP to pod and back.
fn answered(cast: &Cast) -> Vec<Step> {
    datagrams(cast).into_iter().take(4).collect()
}

/// "Too big" about what went to the pod. The client must know it as what it sent to the VIP.
fn router_error(cast: &Cast) -> Vec<Step> {
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
fn pod_error(cast: &Cast) -> Vec<Step> {
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
fn client_error(cast: &Cast) -> Vec<Step> {
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

fn two_vips(cast: &Cast) -> Vec<Step> {
    let service = |frontend| Service { frontend, proto: proto::UDP, backends: vec![cast.pod] };
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

fn withdrawn(cast: &Cast) -> Vec<Step> {
    let moved = Cast { pod: cast.other_pod, ..*cast };
    let there = Packet::udp(Ingress, cast.client, cast.vip);
    let mut steps = answered(cast);
    steps.extend([
        request(cast, SYN, Outcome::Opened),
        reply(cast, SYN | ACK, Outcome::Established),
        cast.serve(&[cast.other_pod]),
        request(cast, ACK, Outcome::Forwarded),
        reply(cast, ACK, Outcome::Replied),
        translated(&there, Outcome::Opened, &Packet { dst: cast.other_pod, ..there.clone() }),
        // A SYN on the old connection's port is a new connection.
        request(&moved, SYN, Outcome::Opened),
    ]);
    steps
}

fn refused_by_backend(cast: &Cast) -> Vec<Step> {
    vec![
        cast.serve(&[cast.pod]),
        request(cast, SYN, Outcome::Opened),
        reply(cast, RST | ACK, Outcome::Replied),
        request(cast, SYN, Outcome::Forwarded),
    ]
}

fn malformed(cast: &Cast) -> Vec<Step> {
    let good = Packet::tcp(Ingress, cast.client, cast.vip, SYN).frame();
    let broken = |change: fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        let (outcome, becomes) = (Outcome::Malformed, Becomes::Same);
        Step::Packet { side: Ingress, frame, outcome, becomes }
    };
    let header = if cast.vip.is_ipv4() { 20 } else { 40 };
    let short = |length| Step::Packet {
        side: Ingress,
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
