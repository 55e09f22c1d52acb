//! One client port, to a pod through its VIP and by the pod's own address (fault P): each answer has the address that was asked.

use std::net::SocketAddr;

use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::testing::{Hook, Packet, Service, ends};
use proxy_common::{Outcome, V4, V6, proto};
use proxy_ebpf::testing::{Host, HostFamily};

use crate::{ACK, FIN, SYN, at};

struct Cast {
    client: SocketAddr,
    vip: SocketAddr,
    pod: SocketAddr,
}

fn cast<F: HostFamily>() -> Cast {
    let [client, vip, pod] = if F::BITS == 32 {
        ["10.0.0.1:40000", "10.96.0.1:80", "10.0.1.1:8080"]
    } else {
        ["[fd00::1]:40000", "[fd00:96::1]:80", "[fd00:1::1]:8080"]
    };
    Cast { client: at(client), vip: at(vip), pod: at(pod) }
}

fn serving<F: HostFamily>() -> (Host<F>, Cast) {
    let (mut host, cast) = (Host::<F>::new(), cast::<F>());
    let service = |proto| Service::new(cast.vip, proto, &[cast.pod]);
    host.serve(&[service(proto::TCP), service(proto::UDP)]);
    (host, cast)
}

/// A client's packet, which is led to the pod wherever it was sent: as whom the pod sees the client.
fn asks<F: HostFamily>(host: &Host<F>, cast: &Cast, packet: &Packet) -> SocketAddr {
    let (_, frame) = host.see(Hook::Ingress, &packet.frame());
    let [seen_as, to] = ends(&frame);
    assert_eq!(to, cast.pod);
    seen_as
}

/// Whom the client takes for the sender of the pod's answer.
fn answered<F: HostFamily>(host: &Host<F>, cast: &Cast, answer: &Packet) -> SocketAddr {
    let (_, frame) = host.see(Hook::Egress, &answer.frame());
    let [from, to] = ends(&frame);
    assert_eq!(to, cast.client);
    from
}

fn connections<F: HostFamily>() {
    for order in [[true, false], [false, true]] {
        let (host, cast) = serving::<F>();
        let to = |is_direct: bool| if is_direct { cast.pod } else { cast.vip };
        let ask = |is_direct, flags| Packet::tcp(Ingress, cast.client, to(is_direct), flags);
        let mut seen = Vec::new();
        for is_direct in order {
            let seen_as = asks(&host, &cast, &ask(is_direct, SYN));
            let answer = |flags| Packet::tcp(Egress, cast.pod, seen_as, flags);
            assert_eq!(answered(&host, &cast, &answer(SYN | ACK)), to(is_direct), "{order:?}");
            seen.push(seen_as);
        }
        assert_ne!(seen[0], seen[1], "{order:?}");
        for _ in 0..3 {
            for (is_direct, seen_as) in order.into_iter().zip(&seen) {
                assert_eq!(asks(&host, &cast, &ask(is_direct, ACK)), *seen_as);
                let answer = Packet::tcp(Egress, cast.pod, *seen_as, ACK);
                assert_eq!(answered(&host, &cast, &answer), to(is_direct), "{order:?}");
            }
            host.now.set(host.now.get() + 1);
        }
        for (is_direct, seen_as) in order.into_iter().zip(&seen) {
            assert_eq!(asks(&host, &cast, &ask(is_direct, FIN | ACK)), *seen_as);
            let answer = Packet::tcp(Egress, cast.pod, *seen_as, FIN | ACK);
            assert_eq!(answered(&host, &cast, &answer), to(is_direct));
        }
        assert_eq!(host.flows(), 0);
    }
}

fn datagrams<F: HostFamily>() {
    let (host, cast) = serving::<F>();
    for round in 0..4 {
        for to in [cast.pod, cast.vip, cast.vip, cast.pod] {
            let seen_as = asks(&host, &cast, &Packet::udp(Ingress, cast.client, to));
            let answer = Packet::udp(Egress, cast.pod, seen_as);
            assert_eq!(answered(&host, &cast, &answer), to, "{round}");
        }
    }
}

/// Nobody else is kept in mind; nor is a connection in the middle of which we come.
fn others<F: HostFamily>() {
    let (host, cast) = serving::<F>();
    let other = SocketAddr::new(cast.client.ip(), 8080);
    let from = SocketAddr::new(cast.pod.ip(), 40_000);
    for packet in [
        Packet::udp(Ingress, from, other),
        Packet::tcp(Ingress, from, other, SYN),
        Packet::tcp(Ingress, cast.client, cast.pod, ACK),
    ] {
        let untouched = (Outcome::NotService, packet.frame());
        assert_eq!(host.see(Hook::Ingress, &packet.frame()), untouched);
    }
    assert!(host.embryos().is_empty());
}

/// A connection to the pod itself, from outside, after one through its VIP has ended that was masqueraded where it left: every
/// segment has the client's own address.
fn a_direct_one_after_a_masqueraded_one<F: HostFamily>() {
    let (mut host, cast) = serving::<F>();
    host.settings.lifetimes.hold = 10;
    let pass = |side_dst, flags| {
        let packet = Packet::tcp(Ingress, cast.client, side_dst, flags);
        let (_, frame) = host.see(Hook::Uplink, &packet.frame());
        let [from, to] = ends(&frame);
        let (_, frame) = host.see(Hook::Egress, &Packet::tcp(Egress, from, to, flags).frame());
        ends(&frame)
    };
    let [seen_as, _] = pass(cast.vip, SYN);
    assert_ne!(seen_as, cast.client);
    let answers = |flags| host.pass(&Packet::tcp(Ingress, cast.pod, seen_as, flags).frame());
    answers(SYN | ACK);
    pass(cast.vip, ACK);
    pass(cast.vip, FIN | ACK);
    answers(FIN | ACK);
    host.now.set(host.now.get() + 20);
    for flags in [SYN, ACK, ACK] {
        assert_eq!(pass(cast.pod, flags), [cast.client, cast.pod]);
    }
}

#[test]
fn a_port_to_a_pod_and_to_its_vip_is_two_flows_of_both_families() {
    connections::<V4>();
    connections::<V6>();
    datagrams::<V4>();
    datagrams::<V6>();
    others::<V4>();
    others::<V6>();
    a_direct_one_after_a_masqueraded_one::<V4>();
    a_direct_one_after_a_masqueraded_one::<V6>();
}
