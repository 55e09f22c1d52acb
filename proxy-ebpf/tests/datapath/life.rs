//! What only the host can do: time that passes, tables that fill, packets that can't be written.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use proxy_common::settings::ticks;
use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::tables::{FlowValue, ServiceValue};
use proxy_common::testing::{Hook, NODE, Packet, Service, Transport, ends};
use proxy_common::{Outcome, V4, proto};
use proxy_ebpf::datapath::Tables;
use proxy_ebpf::datapath::fast::PATIENCE;
use proxy_ebpf::testing::{Buffer, Host, Note};

use crate::{ACK, FIN, SYN, at, client, pod, vip};

const RST: u8 = 4;

fn serving(proto: u8, backends: &[SocketAddr]) -> Host<V4> {
    let mut host = Host::new();
    host.serve(&[Service::new(vip(), proto, backends)]);
    host
}

/// What is done with a segment of the client.
fn sent(host: &Host<V4>, flags: u8) -> Outcome {
    host.see(Hook::Ingress, &Packet::tcp(Ingress, client(), vip(), flags).frame()).0
}

/// What is done with a segment of the pod.
fn answered(host: &Host<V4>, flags: u8) -> Outcome {
    host.see(Hook::Egress, &Packet::tcp(Egress, pod(), client(), flags).frame()).0
}

fn pass(host: &Host<V4>, seconds: u64) {
    host.now.set(host.now.get() + ticks(seconds));
}

/// A connection whose two ends have heard of each other.
fn connected() -> Host<V4> {
    let host = serving(proto::TCP, &[pod()]);
    connect(&host);
    host
}

fn connect(host: &Host<V4>) {
    assert_eq!(sent(host, SYN), Outcome::Opened);
    assert_eq!(answered(host, SYN | ACK), Outcome::Replied);
    assert_eq!(sent(host, ACK), Outcome::Established);
}

/// A segment of the client that acknowledges a number.
fn acknowledged(host: &Host<V4>, number: u32) -> Outcome {
    let packet = Packet::tcp(Ingress, client(), vip(), ACK);
    let Transport::Tcp { flags, sequence, window, .. } = packet.transport else { panic!("TCP") };
    let transport = Transport::Tcp { flags, sequence, acknowledgement: number, window };
    host.see(Hook::Ingress, &Packet { transport, ..packet }.frame()).0
}

/// Whether a segment of the pod reaches the client as one of the VIP's.
fn comes_from_vip(host: &Host<V4>) -> bool {
    let answer = Packet::tcp(Egress, pod(), client(), ACK);
    host.see(Hook::Egress, &answer.frame()).1 == Packet { src: vip(), ..answer }.frame()
}

/// Fault A1: neither a retransmitted SYN nor an acknowledgement of any other number makes a flow live.
#[test]
fn only_the_acknowledgement_of_the_backends_number_makes_a_connection_live() {
    let host = serving(proto::TCP, &[pod()]);
    sent(&host, SYN);
    answered(&host, SYN | ACK);
    for _ in 0..3 {
        assert_eq!(sent(&host, SYN), Outcome::Forwarded);
        answered(&host, SYN | ACK);
    }
    for number in [0, 1, 999, 1000, 1002, 2000, u32::MAX] {
        assert_eq!(acknowledged(&host, number), Outcome::Forwarded, "{number}");
    }
    assert_eq!(host.flows(), 0);
    assert_eq!(acknowledged(&host, 1001), Outcome::Established);
    assert_eq!(host.flows(), 2);
}

/// Faults A2 to A4: a flood of SYNs that are answered, one-shot datagrams and short connections leave
/// nothing among live flows.
#[test]
fn only_flows_that_live_are_among_the_live_ones() {
    let both = [proto::TCP, proto::UDP];
    let mut host = Host::<V4>::new();
    host.serve(&both.map(|proto| Service::new(vip(), proto, &[pod()])));
    for port in 1000..1100 {
        let one = SocketAddr::new(client().ip(), port);
        let see = |hook, packet: Packet| host.see(hook, &packet.frame()).0;
        see(Hook::Ingress, Packet::udp(Ingress, one, vip()));
        see(Hook::Egress, Packet::udp(Egress, pod(), one));
        for _ in 0..2 {
            see(Hook::Ingress, Packet::tcp(Ingress, one, vip(), SYN));
            see(Hook::Egress, Packet::tcp(Egress, pod(), one, SYN | ACK));
        }
        assert_eq!(host.flows(), 0);
        see(Hook::Ingress, Packet::tcp(Ingress, one, vip(), ACK));
        assert_eq!(host.flows(), 2);
        see(Hook::Ingress, Packet::tcp(Ingress, one, vip(), FIN | ACK));
        see(Hook::Egress, Packet::tcp(Egress, pod(), one, FIN | ACK));
        assert_eq!(see(Hook::Ingress, Packet::tcp(Ingress, one, vip(), ACK)), Outcome::Forwarded);
        assert_eq!(host.flows(), 0);
    }
}

#[test]
fn datagrams_are_a_stream_when_the_client_goes_on_after_an_answer() {
    let there = Packet::udp(Ingress, client(), vip()).frame();
    let back = Packet::udp(Egress, pod(), client()).frame();
    let host = serving(proto::UDP, &[pod()]);
    for (seconds, there_then, back_then) in [
        (0, Outcome::Opened, Outcome::Replied),
        (40, Outcome::Opened, Outcome::Replied),
        (20, Outcome::Established, Outcome::Replied),
        (170, Outcome::Forwarded, Outcome::Replied),
        (190, Outcome::Opened, Outcome::Replied),
    ] {
        pass(&host, seconds);
        let outcomes = (host.see(Hook::Ingress, &there).0, host.see(Hook::Egress, &back).0);
        assert_eq!(outcomes, (there_then, back_then), "after {seconds} s more");
    }
}

#[test]
fn a_flow_that_has_ended_does_not_spoil_its_successor_through_another_vip() {
    let other = at("10.96.0.2:80");
    for (end, wait) in [(FIN | ACK, 62), (RST, 62), (ACK, 25 * 3600)] {
        let mut host = Host::<V4>::new();
        host.serve(&[vip(), other].map(|vip| Service::new(vip, proto::TCP, &[pod()])));
        connect(&host);
        sent(&host, end);
        answered(&host, end);
        pass(&host, wait);
        let syn = Packet::tcp(Ingress, client(), other, SYN);
        let (outcome, arrived) = host.see(Hook::Ingress, &syn.frame());
        assert_eq!(outcome, Outcome::Opened);
        assert_eq!(arrived, Packet { dst: pod(), ..syn }.frame(), "the port was free");
        let answer = Packet::tcp(Egress, pod(), client(), SYN | ACK);
        let (outcome, returned) = host.see(Hook::Egress, &answer.frame());
        assert_eq!(outcome, Outcome::Replied);
        assert_eq!(returned, Packet { src: other, ..answer }.frame());
    }
}

#[test]
fn a_flow_that_nobody_answers_keeps_its_place() {
    let other = at("10.96.0.2:80");
    let mut host = Host::<V4>::new();
    host.serve(&[vip(), other].map(|vip| Service::new(vip, proto::UDP, &[pod()])));
    let send = |host: &Host<V4>, to| {
        let packet = Packet::udp(Ingress, client(), to);
        let arrived = host.see(Hook::Ingress, &packet.frame()).1;
        arrived == Packet { dst: pod(), ..packet }.frame()
    };
    for _ in 0..6 {
        assert!(send(&host, vip()), "under the client's own port");
        pass(&host, 20);
    }
    assert!(!send(&host, other), "the port is taken");
    assert!(send(&host, vip()));
}

#[test]
fn a_client_stays_with_its_backend_while_it_is_there_kp_95_to_97() {
    let backends = [pod(), at("10.0.1.2:8080"), at("10.0.1.3:8080")];
    let service = |backends: &[SocketAddr]| Service {
        affinity: ticks(100),
        ..Service::new(vip(), proto::UDP, backends)
    };
    let mut host = Host::<V4>::new();
    host.serve(&[service(&backends)]);
    let reached = |host: &Host<V4>, client: u8, port: u16| {
        let client = SocketAddr::from(([10, 0, 0, client], port));
        let frame = host.see(Hook::Ingress, &Packet::udp(Ingress, client, vip()).frame()).1;
        IpAddr::from(<[u8; 4]>::try_from(&frame[30..34]).unwrap())
    };
    let chosen = reached(&host, 1, 1000);
    assert!((1001..1020).all(|port| reached(&host, 1, port) == chosen));
    let others: BTreeSet<IpAddr> = (2..30).map(|c| reached(&host, c, 1000)).collect();
    assert_eq!(others.len(), 3, "other clients spread");
    // Each new flow renews the stay; idle for too long, it ends.
    pass(&host, 90);
    assert_eq!(reached(&host, 1, 2000), chosen);
    pass(&host, 90);
    assert_eq!(reached(&host, 1, 2001), chosen);
    assert!((3000..3040).any(|port| {
        pass(&host, 110);
        reached(&host, 1, port) != chosen
    }));
    // Without its backend the client gets another one, and stays there.
    let last = reached(&host, 1, 4000);
    let left: Vec<SocketAddr> = backends.into_iter().filter(|b| b.ip() != last).collect();
    host.serve(&[service(&left)]);
    let next = reached(&host, 1, 4001);
    assert!(next != last && (4002..4010).all(|port| reached(&host, 1, port) == next));
}

#[test]
fn an_answer_that_comes_too_late_is_a_strangers() {
    let host = serving(proto::UDP, &[pod()]);
    host.see(Hook::Ingress, &Packet::udp(Ingress, client(), vip()).frame());
    pass(&host, 40);
    let answer = Packet::udp(Egress, pod(), client()).frame();
    assert_eq!(host.see(Hook::Egress, &answer).0, Outcome::NotService);
}

#[test]
fn answers_to_the_nodes_own_connections_are_not_taken_for_new_ones() {
    let mut host = Host::<V4>::new();
    let node_port = Service { flags: 0, ..Service::new(at("0.0.0.0:40000"), proto::TCP, &[pod()]) };
    host.serve(&[node_port]);
    let (server, node) = (at("198.51.100.1:443"), SocketAddr::new(NODE[0], 40_000));
    let seen = |host: &Host<V4>, flags| {
        host.see(Hook::Uplink, &Packet::tcp(Ingress, server, node, flags).frame()).0
    };
    assert_eq!(seen(&host, SYN | ACK), Outcome::NotService);
    host.sockets = vec![(server, node)];
    assert_eq!(seen(&host, ACK), Outcome::NotService);
    host.sockets.clear();
    // Of one that the kernel's own NAT gave the node's address no socket knows, but it was seen to leave.
    let syn = Packet::tcp(Egress, node, server, SYN).frame();
    assert_eq!(host.see(Hook::Egress, &syn), (Outcome::NotService, syn.clone()));
    assert_eq!(
        (seen(&host, SYN | ACK), seen(&host, ACK)),
        (Outcome::NotService, Outcome::NotService)
    );
    let other = at("198.51.100.2:443");
    let syn = Packet::tcp(Ingress, other, node, SYN).frame();
    assert_eq!(host.see(Hook::Uplink, &syn).0, Outcome::Opened);
}

/// What a pod's packet was led to where it came in, the kernel's own NAT may give the node's address: then it is seen where it leaves
/// all the same, and no flow of ours gets the same place. Otherwise nothing is looked up there.
#[test]
fn a_pods_flow_that_the_host_masquerades_is_noted_where_it_leaves() {
    let mut host = Host::<V4>::new();
    let node_port = Service { flags: 0, ..Service::new(at("0.0.0.0:30080"), proto::TCP, &[pod()]) };
    host.serve(&[node_port, Service::new(vip(), proto::TCP, &[pod()])]);
    let mut sent = Buffer::new(&Packet::tcp(Ingress, client(), vip(), SYN).frame());
    assert_eq!(host.see_buffer(Hook::Ingress, &mut sent), Outcome::Opened);
    let mut as_it_is = sent.clone();
    let embryos = host.embryos().len();
    assert_eq!(host.see_buffer(Hook::Egress, &mut as_it_is), Outcome::NotService);
    assert_eq!(host.embryos().len(), embryos, "nothing is noted");
    let own = SocketAddr::new(NODE[0], 5000);
    sent.bytes = Packet::tcp(Ingress, own, pod(), SYN).frame();
    assert_eq!(host.see_buffer(Hook::Egress, &mut sent), Outcome::NotService);
    // From outside by that very port: the backend could not tell the two apart.
    let asked = SocketAddr::new(NODE[0], 30_080);
    let syn = Packet::tcp(Ingress, at("198.51.100.1:5000"), asked, SYN).frame();
    let (outcome, frame) = host.pass(&syn);
    assert_eq!(outcome, Outcome::Masqueraded);
    assert_ne!(ends(&frame)[0], own);
}

/// By another link than the one that the node's own packets would take it is that link's address; without one it can't be
/// masqueraded, and must not leave as it is: the pod would answer someone who has never heard of it.
#[test]
fn by_a_link_without_an_address_of_the_node_nothing_is_masqueraded() {
    let mut host = Host::<V4>::new();
    host.way.link = 0;
    host.serve(&[Service::new(vip(), proto::TCP, &[pod()])]);
    let syn = Packet::tcp(Ingress, at("198.51.100.1:1"), vip(), SYN).frame();
    assert_eq!(host.pass(&syn).0, Outcome::NoSource);
    host.exit = Some(at("192.0.2.99:0").ip());
    let (outcome, frame) = host.pass(&syn);
    assert_eq!((outcome, ends(&frame)[0]), (Outcome::Masqueraded, at("192.0.2.99:1")));
}

/// As upstream's end-to-end tests have it: its own node leads it to any pod.
#[test]
fn a_pod_of_another_node_comes_from_outside_kp_57() {
    let mut host = Host::<V4>::new();
    host.pods = Some((at("10.244.0.0:0").ip(), 16));
    let flags = ServiceValue::LOCAL_FOR_OUTSIDE;
    host.serve(&[Service { flags, ..Service::new(vip(), proto::TCP, &[pod()]) }]);
    let syn = Packet::tcp(Ingress, at("10.244.3.1:1"), vip(), SYN).frame();
    assert_eq!(host.see(Hook::Uplink, &syn).0, Outcome::NoLocal);
    assert_eq!(host.see(Hook::Ingress, &syn).0, Outcome::Opened);
}

/// KP-116. After its time only a SYN is taken for another connection: what goes on in the middle of one
/// belongs to it.
#[test]
fn an_idle_connection_ends_after_its_time_and_not_before() {
    for (hours, outcome) in [(23, Outcome::Forwarded), (25, Outcome::Opened)] {
        let host = connected();
        pass(&host, hours * 3600);
        assert_eq!(sent(&host, SYN), outcome, "after {hours} hours");
    }
    let host = connected();
    pass(&host, 25 * 3600);
    assert!(comes_from_vip(&host));
    assert_eq!(sent(&host, ACK), Outcome::Forwarded);
}

#[test]
fn a_syn_keeps_no_connection_alive() {
    let host = connected();
    for _ in 0..25 {
        pass(&host, 3600);
        sent(&host, SYN);
    }
    let handshakes = host.embryos();
    assert_eq!(sent(&host, SYN), Outcome::Forwarded, "of the one that the last SYN opened");
    assert!(host.live().is_empty() && handshakes.len() == 2);
}

#[test]
fn an_unanswered_flow_ends_after_a_minute() {
    let host = serving(proto::TCP, &[pod()]);
    assert_eq!(sent(&host, SYN), Outcome::Opened);
    pass(&host, 58);
    assert_eq!(sent(&host, SYN), Outcome::Forwarded);
    pass(&host, 63);
    assert_eq!(sent(&host, SYN), Outcome::Opened);
}

#[test]
fn a_half_closed_connection_goes_on_kp_116() {
    let host = connected();
    assert_eq!(sent(&host, FIN | ACK), Outcome::Forwarded);
    for _ in 0..3 {
        pass(&host, 3500);
        assert_eq!(
            (answered(&host, ACK), sent(&host, ACK)),
            (Outcome::Replied, Outcome::Forwarded)
        );
    }
    assert_eq!(host.flows(), 2);
    assert_eq!(answered(&host, FIN | ACK), Outcome::Replied);
    assert_eq!(host.flows(), 0);
    // Both have finished: the last ACK.
    assert_eq!(sent(&host, ACK), Outcome::Forwarded);
}

/// Fault R: neither a reset that the other end ignores nor FINs of a stranger end a connection, and what
/// was in flight when one ended does not bring it back.
#[test]
fn an_end_that_was_none_costs_no_connection() {
    for ends in
        [&[(true, RST)][..], &[(false, RST | ACK)], &[(true, FIN | ACK), (false, FIN | ACK)]]
    {
        let host = connected();
        for (of_client, flags) in ends {
            if *of_client {
                sent(&host, *flags)
            } else {
                answered(&host, *flags)
            };
        }
        assert_eq!(host.flows(), 0);
        // In flight, at once or a little later: of one side only, or of both within their aftermath.
        assert_eq!(
            (answered(&host, ACK), sent(&host, ACK)),
            (Outcome::Replied, Outcome::Forwarded)
        );
        pass(&host, 5);
        assert_eq!(answered(&host, ACK), Outcome::Replied);
        assert_eq!(host.flows(), 0, "one side alone");
        for wait in [0, 1000] {
            pass(&host, wait);
            assert!(comes_from_vip(&host));
        }
        assert_eq!(sent(&host, ACK), Outcome::Established, "both go on");
        assert_eq!(host.flows(), 2);
        pass(&host, 20 * 3600);
        assert!(comes_from_vip(&host));
    }
}

#[test]
fn the_port_of_a_connection_that_has_ended_is_used_again_at_once_by_the_same_client() {
    let host = connected();
    sent(&host, FIN | ACK);
    answered(&host, FIN | ACK);
    let syn = Packet::tcp(Ingress, client(), vip(), SYN);
    let (outcome, arrived) = host.see(Hook::Ingress, &syn.frame());
    assert_eq!((outcome, arrived), (Outcome::Opened, Packet { dst: pod(), ..syn }.frame()));
    assert_eq!(answered(&host, SYN | ACK), Outcome::Replied);
    assert_eq!(sent(&host, ACK), Outcome::Established);
}

/// A full table refuses nothing: flows are served from where flows can be evicted, and move when there
/// is room.
#[test]
fn with_a_full_table_flows_are_served_all_the_same() {
    for capacity in [0, 1] {
        let mut host = serving(proto::TCP, &[pod()]);
        host.capacity = capacity;
        sent(&host, SYN);
        answered(&host, SYN | ACK);
        for _ in 0..3 {
            assert_eq!((sent(&host, ACK), comes_from_vip(&host)), (Outcome::Forwarded, true));
        }
        assert!(host.counted.borrow().contains_key(&Outcome::TableFull));
        assert_eq!(host.flows(), 0, "half a flow was left");
        // For as long as any other.
        pass(&host, 23 * 3600);
        assert_eq!((sent(&host, ACK), comes_from_vip(&host)), (Outcome::Forwarded, true));
        host.capacity = 2;
        pass(&host, 2);
        assert_eq!(sent(&host, ACK), Outcome::Established);
        assert!(comes_from_vip(&host) && host.flows() == 2);
        sent(&host, FIN | ACK);
        answered(&host, FIN | ACK);
        assert_eq!(host.flows(), 0);
    }
    let mut host = serving(proto::TCP, &[pod()]);
    host.capacity = 0;
    connect_without_room(&host);
    sent(&host, FIN | ACK);
    answered(&host, FIN | ACK);
    assert_eq!(sent(&host, SYN), Outcome::Opened, "it has ended there too");
}

fn connect_without_room(host: &Host<V4>) {
    sent(host, SYN);
    answered(host, SYN | ACK);
    assert_eq!(sent(host, ACK), Outcome::Forwarded);
}

/// Whatever part of a handshake or of an exchange is evicted: it goes on with the same pod and port.
#[test]
fn what_is_evicted_comes_back_to_the_same_pod_and_port() {
    // From a pod two records, from outside four.
    for evicted in 1..4 {
        comes_back(false, evicted);
    }
    for evicted in 1..16 {
        comes_back(true, evicted);
    }
}

/// Each bit of `evicted` stands for a record.
fn comes_back(is_outside: bool, evicted: u8) {
    let pods: Vec<SocketAddr> = (1..9).map(|n| SocketAddr::from(([10, 0, 1, n], 8080))).collect();
    let (from, to, frontend) = if is_outside {
        let to = SocketAddr::new(NODE[0], 30_080);
        (at("198.51.100.7:50000"), to, at("0.0.0.0:30080"))
    } else {
        (client(), vip(), vip())
    };
    let mut host = Host::<V4>::new();
    host.serve(&[Service { flags: 0, ..Service::new(frontend, proto::TCP, &pods) }]);
    let asks = |flags| {
        let frame = Packet::tcp(Ingress, from, to, flags).frame();
        let seen = if is_outside { host.pass(&frame) } else { host.see(Hook::Ingress, &frame) };
        ends(&seen.1)
    };
    let [seen_as, pod] = asks(SYN);
    let answers = |flags| {
        let seen = if is_outside {
            host.pass(&Packet::tcp(Ingress, pod, seen_as, flags).frame())
        } else {
            host.see(Hook::Egress, &Packet::tcp(Egress, pod, seen_as, flags).frame())
        };
        ends(&seen.1)
    };
    let evict = || {
        let keys = (0..8).zip(host.embryos());
        let chosen = keys.filter(|(position, _)| evicted >> position & 1 != 0);
        chosen.for_each(|(_, (key, _))| host.evict(&key));
    };
    evict();
    assert_eq!(asks(SYN), [seen_as, pod]);
    assert_eq!(answers(SYN | ACK), [to, from]);
    evict();
    assert_eq!(asks(ACK), [seen_as, pod], "outside: {is_outside}, {evicted:b}");
    assert_eq!(answers(ACK), [to, from]);
    asks(ACK);
    let all = if is_outside { 4 } else { 2 };
    assert_eq!(host.flows(), all, "outside: {is_outside}, {evicted:b}");
}

/// What ended is made again as what ended: the client's next connection from that port begins, and is answered.
#[test]
fn a_port_is_used_again_though_half_of_what_ended_was_evicted() {
    let host = connected();
    assert_eq!(answered(&host, RST), Outcome::Replied);
    let (asked, _) =
        host.embryos().into_iter().find(|(key, _)| key.sport.number() == 40_000).unwrap();
    host.evict(&asked);
    assert_eq!(answered(&host, ACK), Outcome::Replied);
    assert_eq!(sent(&host, SYN), Outcome::Opened);
    assert_eq!(answered(&host, SYN | ACK), Outcome::Replied);
}

/// Segments of one side only, long after the end, are no connection that goes on: the client's next one from that port begins anew, and is
/// answered.
#[test]
fn a_port_is_used_again_though_one_side_went_on_after_the_end() {
    for is_clients in [true, false] {
        let host = connected();
        assert_eq!(answered(&host, RST), Outcome::Replied);
        host.now.set(host.now.get() + 3);
        if is_clients {
            assert_eq!(sent(&host, ACK), Outcome::Forwarded);
        } else {
            assert_eq!(answered(&host, ACK), Outcome::Replied);
        }
        assert_eq!(sent(&host, SYN), Outcome::Opened, "of the client: {is_clients}");
        assert_eq!(answered(&host, SYN | ACK), Outcome::Replied, "of the client: {is_clients}");
    }
}

/// Either record is made from the other within [`PATIENCE`] ticks of traffic, in both tables.
#[test]
fn a_lost_half_is_made_anew() {
    for lost_reply in [true, false] {
        let host = connected();
        let all: BTreeMap<u16, _> = host
            .live()
            .into_iter()
            .map(|(key, value)| (key.sport.number(), (key, value)))
            .collect();
        let lost = all[if lost_reply { &8080 } else { &40_000 }];
        Tables::remove(&host, &lost.0);
        host.evict(&lost.0);
        assert_eq!(host.flows(), 1);
        pass(&host, u64::from(PATIENCE) + 1);
        if lost_reply {
            sent(&host, ACK)
        } else {
            answered(&host, ACK)
        };
        let live = host.live();
        let made = live.iter().find(|(key, _)| *key == lost.0).expect("it is there again").1;
        let (seen, ask_at) = (host.now.get(), made.ask_at);
        assert_eq!(made, FlowValue { seen, ask_at, packets: 0, bytes: 0, ..lost.1 });
    }
}

#[test]
fn traffic_is_counted_by_service_port() {
    let host = connected();
    for _ in 0..10 {
        pass(&host, u64::from(PATIENCE) + 1);
        (0..3).for_each(|_| {
            sent(&host, ACK);
        });
        answered(&host, ACK);
    }
    pass(&host, u64::from(PATIENCE) + 1);
    sent(&host, ACK);
    answered(&host, ACK);
    let (packets, bytes) = host.traffic.borrow()[&1];
    assert_eq!(packets, 3 + 10 * 4 + 2);
    let lengths = [SYN, SYN | ACK, ACK].map(|flags| {
        let segment = Packet::tcp(Ingress, client(), vip(), flags);
        segment.frame().len() as u64
    });
    assert_eq!(bytes, lengths[0] + lengths[1] + 43 * lengths[2]);
}

/// What only a flow's record has counted is handed over after [`PATIENCE`] ticks, and at the flow's end at the latest.
#[test]
fn every_packet_of_a_live_flow_is_counted_once() {
    let host = connected();
    let replied = |count| assert_eq!(host.counted.borrow().get(&Outcome::Replied), Some(&count));
    for _ in 0..5 {
        answered(&host, ACK);
    }
    replied(1);
    pass(&host, u64::from(PATIENCE) + 1);
    answered(&host, ACK);
    replied(7);
    answered(&host, ACK);
    answered(&host, ACK | FIN);
    sent(&host, ACK | FIN);
    replied(9);
    let packets = host.traffic.borrow()[&1].0;
    assert_eq!(packets, 3 + 5 + 1 + 1 + 2);
    let counted: u32 = host.counted.borrow().values().sum();
    assert_eq!(u64::from(counted), packets);
}

/// Many flows of a node with one address to one backend: from one client, and from clients whose own
/// ports meet.
#[test]
fn at_least_28_000_flows_go_from_one_address_to_one_backend() {
    let mut host = Host::<V4>::new();
    let frontend = Service { flags: 0, ..Service::new(at("0.0.0.0:30080"), proto::UDP, &[pod()]) };
    host.serve(&[frontend]);
    let to = SocketAddr::new(NODE[0], 30_080);
    let mut ports = BTreeSet::new();
    for number in 0..28_000_u32 {
        let [a, b, c, d] = number.to_be_bytes();
        // Four clients, with the same ports each.
        let from = SocketAddr::from((
            [198, 51, 100, d & 3],
            40_000 + (u16::from(b) << 14 | u16::from(c) << 6 | u16::from(d >> 2)),
        ));
        assert_eq!(a, 0);
        let (outcome, frame) = host.pass(&Packet::udp(Ingress, from, to).frame());
        assert_eq!(outcome, Outcome::Masqueraded, "flow {number}");
        assert!(ports.insert(ends(&frame)[0].port()), "flow {number} has another's port");
    }
}

/// Fault H: places are held for the backend's `TIME_WAIT`, and handed out again before anyone is refused,
/// longest ended first. The sockets of the host keep theirs.
#[test]
fn a_place_is_held_and_then_handed_out_again_longest_ended_first() {
    let mut host = Host::<V4>::new();
    let frontend = Service { flags: 0, ..Service::new(at("0.0.0.0:30080"), proto::TCP, &[pod()]) };
    host.serve(&[frontend]);
    (host.settings.first_port, host.settings.port_count) = (60_000, 8);
    let to = SocketAddr::new(NODE[0], 30_080);
    // Everyone has a port of his own that a socket of the host has at that backend.
    host.sockets = vec![(pod(), SocketAddr::new(NODE[0], 50_000))];
    let see = |host: &Host<V4>, client: u8, flags| {
        let from = SocketAddr::from(([198, 51, 100, client], 50_000));
        let (outcome, frame) = host.pass(&Packet::tcp(Ingress, from, to, flags).frame());
        (outcome, ends(&frame)[0].port())
    };
    let answer = |host: &Host<V4>, port, flags| {
        let seen_as = SocketAddr::new(NODE[0], port);
        host.pass(&Packet::tcp(Ingress, pod(), seen_as, flags).frame());
    };
    let open = |host: &Host<V4>, client| {
        let (outcome, port) = see(host, client, SYN);
        assert_eq!(outcome, Outcome::Masqueraded);
        answer(host, port, SYN | ACK);
        see(host, client, ACK);
        port
    };
    let close = |host: &Host<V4>, client, port| {
        see(host, client, FIN | ACK);
        answer(host, port, FIN | ACK);
    };
    let held: Vec<u16> = (0..8).map(|client| open(&host, client)).collect();
    assert_eq!(held.iter().collect::<BTreeSet<_>>().len(), 8);
    assert!(held.iter().all(|port| (60_000..60_008).contains(port)));
    assert_eq!(see(&host, 100, SYN).0, Outcome::NoPort, "all are alive");
    assert_eq!(host.exhausted.borrow().values().sum::<u64>(), 1);
    for client in [5, 2, 7] {
        close(&host, client, held[usize::from(client)]);
        pass(&host, 5);
    }
    // None has been free for a minute: the one that ended first.
    let next: Vec<u16> = (101..104).map(|client| open(&host, client)).collect();
    assert_eq!(next, [held[5], held[2], held[7]]);
    close(&host, 0, held[0]);
    pass(&host, 65);
    close(&host, 1, held[1]);
    assert_eq!(open(&host, 110), held[0], "free after its time");
}

#[test]
fn a_flow_that_left_by_itself_and_one_of_ours_never_share_a_place() {
    let frontend = Service { flags: 0, ..Service::new(at("0.0.0.0:30080"), proto::TCP, &[pod()]) };
    let syn = |host: &Host<V4>| {
        let packet = Packet::tcp(Ingress, at("198.51.100.7:50000"), node(30_080), SYN);
        ends(&host.pass(&packet.frame()).1)[0]
    };
    let own = Packet::tcp(Egress, node(50_000), pod(), SYN);
    // The kernel's own NAT was first.
    let mut host = Host::<V4>::new();
    host.serve(std::slice::from_ref(&frontend));
    assert_eq!(host.see(Hook::Egress, &own.frame()), (Outcome::NotService, own.frame()));
    let other = syn(&host);
    assert_ne!(other, node(50_000));
    let back = Packet::tcp(Ingress, pod(), node(50_000), SYN | ACK);
    assert_eq!(host.see(Hook::Uplink, &back.frame()), (Outcome::NotService, back.frame()));
    // We were.
    let mut host = Host::<V4>::new();
    host.serve(&[frontend]);
    assert_eq!(syn(&host), node(50_000));
    let (outcome, frame) = host.see(Hook::Egress, &own.frame());
    let seen_as = ends(&frame)[0];
    assert_eq!((outcome, seen_as.ip()), (Outcome::Masqueraded, NODE[0]));
    assert_ne!(seen_as.port(), 50_000);
    // What we have sent on ourselves is seen again there.
    let mut ours = Buffer::new(&own.frame());
    ours.note = Note::Done;
    assert_eq!(host.see_buffer(Hook::Egress, &mut ours), Outcome::NotService);
    let back = Packet::tcp(Ingress, pod(), seen_as, SYN | ACK);
    let returned = Packet { dst: node(50_000), ..back.clone() };
    assert_eq!(host.see(Hook::Uplink, &back.frame()), (Outcome::Masqueraded, returned.frame()));
}

#[test]
fn without_a_free_source_port_a_flow_is_refused() {
    let mut host = serving(proto::UDP, &[pod()]);
    let frontends: Vec<SocketAddr> =
        (1..4).map(|host| SocketAddr::from(([10, 96, 0, host], 80))).collect();
    let services = frontends.iter().map(|frontend| Service::new(*frontend, proto::UDP, &[pod()]));
    host.serve(&services.collect::<Vec<_>>());
    host.settings.port_count = 1;
    let ask = |vip: SocketAddr| {
        let (outcome, frame) =
            host.see(Hook::Ingress, &Packet::udp(Ingress, client(), vip).frame());
        (outcome, ends(&frame)[0])
    };
    let stream = |vip: SocketAddr| {
        let (outcome, seen_as) = ask(vip);
        host.see(Hook::Egress, &Packet::udp(Egress, pod(), seen_as).frame());
        ask(vip);
        outcome
    };
    let outcomes: Vec<Outcome> = frontends.iter().map(|vip| stream(*vip)).collect();
    assert_eq!(outcomes, [Outcome::Opened, Outcome::Opened, Outcome::NoPort]);
}

/// Nobody takes all source ports by asking without hearing the answers.
#[test]
fn a_port_whose_client_has_shown_nothing_is_given_away_before_a_flow_is_refused() {
    let mut host = serving_node_port();
    (host.settings.first_port, host.settings.port_count) = (40_000, 50);
    for number in 0..200 {
        let spoofed = SocketAddr::from(([198, 51, 100, number], 40_000 + u16::from(number)));
        assert_eq!(open_node_port(&host, spoofed).0, Outcome::Masqueraded, "client {number}");
    }
    // Who has shown it keeps its own.
    let (_, seen_as) = open_node_port(&host, at("203.0.113.1:40007"));
    let back = |flags| host.pass(&Packet::tcp(Ingress, pod(), seen_as, flags).frame());
    assert_eq!(back(SYN | ACK).0, Outcome::Replied);
    let heard = Packet::tcp(Ingress, at("203.0.113.1:40007"), node(30_080), ACK);
    assert_eq!(host.pass(&heard.frame()).0, Outcome::Masqueraded);
    assert_eq!(host.flows(), 4);
    for number in 0..200 {
        let spoofed = SocketAddr::from(([198, 51, 101, number], 40_000 + u16::from(number)));
        let (outcome, other) = open_node_port(&host, spoofed);
        assert_eq!(outcome, Outcome::Masqueraded, "client {number}");
        assert_ne!(other, seen_as);
    }
    assert_eq!(ends(&back(ACK).1), [node(30_080), at("203.0.113.1:40007")]);
}

fn node(port: u16) -> SocketAddr {
    SocketAddr::new(NODE[0], port)
}

/// A host whose `NodePort` 30080 leads to a pod elsewhere.
fn serving_node_port() -> Host<V4> {
    let mut host = Host::new();
    host.serve(&[Service { flags: 0, ..Service::new(at("0.0.0.0:30080"), proto::TCP, &[pod()]) }]);
    host
}

/// A client's SYN to that `NodePort`: what comes of it, and as whom the pod sees the client.
fn open_node_port(host: &Host<V4>, client: SocketAddr) -> (Outcome, SocketAddr) {
    let syn = Packet::tcp(Ingress, client, node(30_080), SYN);
    let (outcome, frame) = host.pass(&syn.frame());
    (outcome, ends(&frame)[0])
}

/// A connection past every VIP on the very ports of a flow that has ended, or that nobody answered, is none
/// of ours: it begins with an answer to a SYN that nobody saw.
#[test]
fn a_direct_connection_on_the_ports_of_a_flow_that_is_over_is_left_alone() {
    for has_ended in [true, false] {
        let host = if has_ended { connected() } else { serving(proto::TCP, &[pod()]) };
        if has_ended {
            sent(&host, FIN | ACK);
            answered(&host, FIN | ACK);
            pass(&host, 300);
        } else {
            sent(&host, SYN);
            pass(&host, 300);
        }
        for flags in [SYN | ACK, ACK, FIN | ACK] {
            let (sequence, acknowledgement) = (77_000, 88_001);
            let transport = Transport::Tcp { flags, sequence, acknowledgement, window: 512 };
            let direct = Packet::tcp(Egress, pod(), client(), flags);
            let direct = Packet { transport, ..direct }.frame();
            let untouched = (Outcome::NotService, direct.clone());
            assert_eq!(host.see(Hook::Egress, &direct), untouched, "{has_ended}, {flags}");
        }
        // And the VIP serves on.
        assert_eq!(sent(&host, SYN), Outcome::Opened);
    }
}

/// The node's own connections to a backend that has just served many through its `NodePort`.
#[test]
fn the_nodes_own_connection_on_the_place_of_a_flow_that_is_over_gets_its_answers() {
    for seconds in [0, 300] {
        let host = serving_node_port();
        let (_, seen_as) = open_node_port(&host, at("198.51.100.7:50000"));
        host.pass(&Packet::tcp(Ingress, pod(), seen_as, RST | ACK).frame());
        pass(&host, seconds);
        let own = Packet::tcp(Egress, seen_as, pod(), SYN);
        let (_, frame) = host.see(Hook::Egress, &own.frame());
        let from = ends(&frame)[0];
        assert_eq!(from == seen_as, seconds > 60, "while the backend may have it in TIME_WAIT");
        let back = Packet::tcp(Ingress, pod(), from, SYN | ACK);
        let (_, frame) = host.see(Hook::Uplink, &back.frame());
        assert_eq!(ends(&frame)[1], seen_as, "after {seconds} s");
    }
}

/// The kernel's own NAT may give a connection our place when it has been silent.
#[test]
fn a_strangers_connection_that_goes_on_keeps_its_place_however_long_it_was_silent() {
    let host = serving_node_port();
    let own = |flags| Packet::tcp(Egress, node(50_000), pod(), flags).frame();
    let back = |flags| Packet::tcp(Ingress, pod(), node(50_000), flags).frame();
    host.see(Hook::Egress, &own(SYN));
    host.see(Hook::Uplink, &back(SYN | ACK));
    pass(&host, 45);
    for _ in 0..10 {
        assert_eq!(host.see(Hook::Egress, &own(ACK)).0, Outcome::NotService);
        assert_eq!(host.see(Hook::Uplink, &back(ACK)).0, Outcome::NotService);
        pass(&host, 30);
    }
    assert_ne!(open_node_port(&host, at("198.51.100.7:50000")).1, node(50_000));
}

/// A SYN that anybody can send ends no connection whose backend is being drained; after some silence it begins
/// a new one.
#[test]
fn a_syn_ends_no_connection_that_is_being_drained() {
    let mut host = connected();
    host.serve(&[Service::new(vip(), proto::TCP, &[at("10.0.1.9:8080")])]);
    assert_eq!(sent(&host, SYN), Outcome::Forwarded);
    assert_eq!(sent(&host, ACK), Outcome::Forwarded);
    assert_eq!(answered(&host, ACK), Outcome::Replied);
    pass(&host, 10);
    assert_eq!(sent(&host, SYN), Outcome::Opened);
}

#[test]
fn a_packet_that_can_not_be_written_is_said_so() {
    for backends in [&[pod()][..], &[]] {
        let host = serving(proto::TCP, backends);
        let mut buffer = Buffer::new(&Packet::tcp(Ingress, client(), vip(), SYN).frame());
        buffer.writable = false;
        assert_eq!(host.see_buffer(Hook::Ingress, &mut buffer), Outcome::NotWritable);
    }
}
