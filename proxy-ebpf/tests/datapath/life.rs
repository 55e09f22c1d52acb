//! What only the host can do: time that passes, tables that fill, packets that can't be written.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use proxy_common::settings::ticks;
use proxy_common::tables::ServiceValue;
use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::testing::{Hook, NODE, Packet, Service};
use proxy_common::{Outcome, V4, proto};
use proxy_ebpf::testing::{Buffer, Host};

use crate::{ACK, SYN, at, client, pod, vip};

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
    assert_eq!(sent(&host, SYN), Outcome::Opened);
    assert_eq!(answered(&host, SYN | ACK), Outcome::Established);
    assert_eq!(sent(&host, ACK), Outcome::Forwarded);
    host
}

#[test]
fn an_answer_that_the_client_does_not_take_up_counts_for_little() {
    let host = serving(proto::TCP, &[pod()]);
    sent(&host, SYN);
    answered(&host, SYN | ACK);
    pass(&host, 65);
    assert_eq!(answered(&host, SYN | ACK), Outcome::NotService);
    let host = serving(proto::UDP, &[pod()]);
    let there = Packet::udp(Ingress, client(), vip()).frame();
    let back = Packet::udp(Egress, pod(), client()).frame();
    for (seconds, there_then, back_then) in [
        (0, Outcome::Opened, Outcome::Established),
        (170, Outcome::Opened, Outcome::Established),
        (50, Outcome::Forwarded, Outcome::Replied),
        (170, Outcome::Forwarded, Outcome::Replied),
    ] {
        pass(&host, seconds);
        let outcomes = (host.see(Hook::Ingress, &there).0, host.see(Hook::Egress, &back).0);
        assert_eq!(outcomes, (there_then, back_then), "after {seconds} s more");
    }
}

#[test]
fn a_flow_that_has_ended_does_not_spoil_its_successor_through_another_vip() {
    const FIN: u8 = 1;
    const RST: u8 = 4;
    let other = at("10.96.0.2:80");
    for (end, wait) in [(FIN | ACK, 12), (RST, 0), (ACK, 7 * 3600)] {
        let mut host = Host::<V4>::new();
        host.serve(&[vip(), other].map(|vip| Service::new(vip, proto::TCP, &[pod()])));
        sent(&host, SYN);
        answered(&host, SYN | ACK);
        sent(&host, ACK);
        sent(&host, end);
        answered(&host, end);
        pass(&host, wait);
        let syn = Packet::tcp(Ingress, client(), other, SYN);
        let (outcome, arrived) = host.see(Hook::Ingress, &syn.frame());
        assert_eq!(outcome, Outcome::Opened);
        assert_eq!(arrived, Packet { dst: pod(), ..syn }.frame(), "the port was free");
        let answer = Packet::tcp(Egress, pod(), client(), SYN | ACK);
        let (outcome, returned) = host.see(Hook::Egress, &answer.frame());
        assert_eq!(outcome, Outcome::Established);
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
        pass(&host, 40);
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
    pass(&host, 90);
    let answer = Packet::udp(Egress, pod(), client()).frame();
    assert_eq!(host.see(Hook::Egress, &answer).0, Outcome::NotService);
}

#[test]
fn answers_to_the_nodes_own_connections_are_not_taken_for_new_ones() {
    let mut host = Host::<V4>::new();
    let node_port = Service { flags: 0, ..Service::new(at("0.0.0.0:40000"), proto::TCP, &[pod()]) };
    host.serve(&[node_port]);
    let node = SocketAddr::new(NODE[0], 40_000);
    let seen = |flags| {
        let packet = Packet::tcp(Ingress, at("198.51.100.1:443"), node, flags);
        host.see(Hook::Uplink, &packet.frame()).0
    };
    assert_eq!((seen(SYN | ACK), seen(ACK)), (Outcome::NotService, Outcome::NotService));
    assert_eq!(seen(SYN), Outcome::Masqueraded);
}

#[test]
fn without_a_way_to_the_backend_nothing_is_masqueraded() {
    let mut host = Host::<V4>::new();
    host.link = 0;
    host.serve(&[Service::new(vip(), proto::TCP, &[pod()])]);
    let syn = Packet::tcp(Ingress, at("198.51.100.1:1"), vip(), SYN).frame();
    assert_eq!(host.see(Hook::Uplink, &syn).0, Outcome::NoRoute);
}

#[test]
fn a_pod_of_another_node_is_no_outsider_kp_57() {
    let mut host = Host::<V4>::new();
    let flags = ServiceValue::LOCAL_FOR_OUTSIDE;
    host.serve(&[Service { flags, ..Service::new(vip(), proto::TCP, &[pod()]) }]);
    let syn = Packet::tcp(Ingress, at("10.244.3.1:1"), vip(), SYN).frame();
    assert_eq!(host.see(Hook::Uplink, &syn).0, Outcome::NoLocal);
    host.pods = Some((at("10.244.0.0:0").ip(), 16));
    assert_eq!(host.see(Hook::Uplink, &syn).0, Outcome::Masqueraded);
    // KP-85, 86: where pods are not told by their range, that one is.
    host.settings.local_by_cidr = 0;
    let other = Packet::tcp(Ingress, at("10.244.3.1:2"), vip(), SYN).frame();
    assert_eq!(host.see(Hook::Uplink, &other).0, Outcome::NoLocal);
}

#[test]
fn an_idle_connection_ends_after_its_time_and_not_before() {
    let host = connected();
    pass(&host, 6 * 3600 - 2);
    assert_eq!(sent(&host, ACK), Outcome::Forwarded);
    // The pod's direction has been idle for longer, but the connection lives by either.
    pass(&host, 3600);
    assert_eq!(answered(&host, ACK), Outcome::Replied);
    pass(&host, 6 * 3600 + 2);
    assert_eq!(sent(&host, ACK), Outcome::Opened);
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
fn a_half_closed_connection_lives_for_an_hour_kp_116() {
    const FIN: u8 = 1;
    let host = connected();
    assert_eq!(sent(&host, FIN | ACK), Outcome::Forwarded);
    pass(&host, 3500);
    assert_eq!(answered(&host, ACK), Outcome::Replied);
    assert_eq!(answered(&host, FIN | ACK), Outcome::Replied);
    // Both have finished: the last ACK, then seconds.
    assert_eq!(sent(&host, ACK), Outcome::Forwarded);
    pass(&host, 15);
    assert_eq!(answered(&host, ACK), Outcome::NotService);
}

#[test]
fn a_reset_that_the_other_end_ignores_costs_no_connection() {
    const RST: u8 = 4;
    let host = connected();
    assert_eq!(sent(&host, RST), Outcome::Forwarded);
    pass(&host, 5);
    assert_eq!((answered(&host, ACK), sent(&host, ACK)), (Outcome::Replied, Outcome::Forwarded));
    pass(&host, 3600);
    assert_eq!(answered(&host, ACK), Outcome::Replied);
    // One that is heeded ends the flow in seconds.
    assert_eq!(answered(&host, RST), Outcome::Replied);
    pass(&host, 15);
    assert_eq!(answered(&host, ACK), Outcome::NotService);
}

#[test]
fn a_full_table_refuses_new_flows_and_keeps_old_ones() {
    let mut host = serving(proto::TCP, &[pod()]);
    assert_eq!(
        (sent(&host, SYN), answered(&host, SYN | ACK)),
        (Outcome::Opened, Outcome::Established)
    );
    for capacity in [2, 3] {
        host.capacity = capacity;
        let newcomer = SocketAddr::new(client().ip(), 50_000);
        let syn = Packet::tcp(Ingress, newcomer, vip(), SYN).frame();
        assert_ne!(host.see(Hook::Ingress, &syn).0, Outcome::TableFull);
        let answer = Packet::tcp(Egress, pod(), newcomer, SYN | ACK).frame();
        assert_eq!(host.see(Hook::Egress, &answer).0, Outcome::TableFull);
        assert_eq!(host.flows(), 2, "half a flow was left");
        assert_eq!(
            (sent(&host, ACK), answered(&host, ACK)),
            (Outcome::Forwarded, Outcome::Replied)
        );
    }
}

#[test]
fn without_a_free_source_port_a_flow_is_refused() {
    let mut host = serving(proto::UDP, &[pod()]);
    let frontends: Vec<SocketAddr> =
        (1..4).map(|host| SocketAddr::from(([10, 96, 0, host], 80))).collect();
    let services = frontends.iter().map(|frontend| Service::new(*frontend, proto::UDP, &[pod()]));
    host.serve(&services.collect::<Vec<_>>());
    host.settings.port_count = 1;
    let outcomes = frontends
        .iter()
        .map(|vip| host.see(Hook::Ingress, &Packet::udp(Ingress, client(), *vip).frame()).0);
    let outcomes: Vec<Outcome> = outcomes.collect();
    assert_eq!(outcomes, [Outcome::Opened, Outcome::Opened, Outcome::NoPort]);
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
