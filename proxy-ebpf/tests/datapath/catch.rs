//! The second line: what goes to a VIP and leaves untranslated.

use std::net::{IpAddr, SocketAddr};

use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::tables::{FlowKey, ServiceValue};
use proxy_common::testing::{Hook, LINK, NODE, Packet, Service, ends, is_valid};
use proxy_common::{Outcome, V4, V6, proto};
use proxy_ebpf::datapath::socket::{self, Act};
use proxy_ebpf::testing::{Buffer, Call, Host, HostFamily};

use crate::{ACK, SYN, at, over_both};

/// The catch-all link.
const CATCH_ALL: u32 = 9;

struct Cast {
    pod: SocketAddr,
    vip: SocketAddr,
    backend: SocketAddr,
    node: IpAddr,
}

fn cast<F: HostFamily>() -> Cast {
    let is_v4 = F::BITS == 32;
    let [pod, vip, backend] = if is_v4 {
        ["10.244.0.7:40000", "10.96.0.1:80", "10.244.0.9:8080"]
    } else {
        ["[fd00:244::7]:40000", "[fd00:96::1]:80", "[fd00:244::9]:8080"]
    };
    Cast { pod: at(pod), vip: at(vip), backend: at(backend), node: NODE[usize::from(!is_v4)] }
}

fn catching<F: HostFamily>(number: u8, is_local: bool) -> (Host<F>, Cast) {
    let (mut host, cast) = (Host::<F>::new(), cast::<F>());
    let local = if is_local { vec![cast.backend] } else { Vec::new() };
    host.serve(&[Service { local, ..Service::new(cast.vip, number, &[cast.backend]) }]);
    host.settings.catch_all = CATCH_ALL;
    (host, cast)
}

/// A packet leaves: what becomes of it, by which link it comes in again, and who then talks to whom.
fn leaves<F: HostFamily>(host: &Host<F>, packet: &Packet) -> (Outcome, u32, [SocketAddr; 2]) {
    let mut buffer = Buffer::new(&packet.frame());
    let verdict = host.verdict(Hook::Egress, &mut buffer);
    assert!(is_valid(&buffer.bytes));
    (verdict.outcome, verdict.link, ends(&buffer.bytes))
}

fn packet(
    number: u8,
    side: proxy_common::tables::Side,
    ends: [SocketAddr; 2],
    flags: u8,
) -> Packet {
    match number {
        proto::TCP => Packet::tcp(side, ends[0], ends[1], flags),
        _ => Packet::udp(side, ends[0], ends[1]),
    }
}

/// A conversation whose packets are all seen where they leave: of a pod and of a backend without programs.
fn is_led_there_and_back<F: HostFamily>() {
    for number in [proto::TCP, proto::UDP] {
        let (host, Cast { pod, vip, backend, .. }) = catching::<F>(number, true);
        let stands_in = SocketAddr::new(vip.ip(), pod.port());
        let there = |flags| leaves(&host, &packet(number, Egress, [pod, vip], flags));
        let back = |flags| leaves(&host, &packet(number, Egress, [backend, stands_in], flags));
        assert_eq!(there(SYN), (Outcome::Caught, CATCH_ALL, [stands_in, backend]));
        assert_eq!(back(SYN | ACK), (Outcome::Caught, CATCH_ALL, [vip, pod]));
        for _ in 0..3 {
            assert_eq!(there(ACK), (Outcome::Caught, CATCH_ALL, [stands_in, backend]));
            assert_eq!(back(ACK), (Outcome::Caught, CATCH_ALL, [vip, pod]));
            host.now.set(host.now.get() + 1);
        }
        assert_eq!(host.flows(), 2, "it is live");
        // Where a link has programs, they leave it to the second line: the backend's, and the client's when it has got some.
        let untouched = |packet: Packet| {
            let seen = host.see(Hook::Ingress, &packet.frame());
            assert_eq!(seen, (Outcome::NotService, packet.frame()));
        };
        untouched(packet(number, Ingress, [backend, stands_in], SYN | ACK));
        untouched(packet(number, Ingress, [backend, stands_in], ACK));
        untouched(packet(number, Ingress, [pod, vip], ACK));
    }
}

#[test]
fn what_is_caught_is_led_there_and_back() {
    over_both([is_led_there_and_back::<V4>, is_led_there_and_back::<V6>]);
}

/// A backend elsewhere sees the node, which translates its answers at both edges.
fn is_masqueraded_to_a_backend_elsewhere<F: HostFamily>() {
    for number in [proto::TCP, proto::UDP] {
        let (host, Cast { pod, vip, backend, node }) = catching::<F>(number, false);
        let stands_in = SocketAddr::new(vip.ip(), pod.port());
        leaves(&host, &packet(number, Egress, [pod, vip], SYN));
        let (outcome, link, [seen_as, to]) =
            leaves(&host, &packet(number, Egress, [stands_in, backend], SYN));
        assert_eq!((outcome, link, seen_as.ip(), to), (Outcome::Masqueraded, 0, node, backend));
        let answer = packet(number, Ingress, [backend, seen_as], SYN | ACK);
        let (outcome, frame) = host.see(Hook::Uplink, &answer.frame());
        assert_eq!((outcome, ends(&frame)), (Outcome::Masqueraded, [backend, stands_in]));
        let answer = packet(number, Egress, [backend, stands_in], SYN | ACK);
        assert_eq!(leaves(&host, &answer), (Outcome::Caught, CATCH_ALL, [vip, pod]));
    }
}

#[test]
fn what_is_caught_is_masqueraded_to_a_backend_elsewhere() {
    over_both([
        is_masqueraded_to_a_backend_elsewhere::<V4>,
        is_masqueraded_to_a_backend_elsewhere::<V6>,
    ]);
}

/// Refusals, answers to pings and errors go in again too, toward who has asked.
fn is_answered<F: HostFamily>() {
    let (mut host, Cast { pod, vip, backend, .. }) = catching::<F>(proto::TCP, true);
    let elsewhere = SocketAddr::new(vip.ip(), 81);
    let refused = |host: &Host<F>, packet: &Packet| {
        let verdict = host.verdict(Hook::Egress, &mut Buffer::new(&packet.frame()));
        assert_eq!(verdict.link, CATCH_ALL);
        verdict.outcome
    };
    let syn = Packet::tcp(Egress, pod, elsewhere, SYN);
    assert_eq!(refused(&host, &syn), Outcome::Reset);
    assert_eq!(refused(&host, &Packet::udp(Egress, pod, elsewhere)), Outcome::Unreachable);
    let [request, _] = F::ECHO;
    let ping = Packet::icmp(Egress, pod.ip(), vip.ip(), [request, 0], b"hello".to_vec());
    assert_eq!(refused(&host, &ping), Outcome::EchoReply);
    // An external IP may be a machine's: what is no Service's goes there.
    host.serve(&[Service { flags: 0, ..Service::new(vip, proto::TCP, &[backend]) }]);
    for packet in [syn, ping] {
        let seen = host.see(Hook::Egress, &packet.frame());
        assert_eq!(seen, (Outcome::NotService, packet.frame()));
    }
}

#[test]
fn what_is_caught_is_answered_where_nobody_serves() {
    over_both([is_answered::<V4>, is_answered::<V6>]);
}

/// Behind the kernel's NAT a client has another address than its segments have where they come in: for a moment those are left alone,
/// until the agent knows.
fn is_learnt<F: HostFamily>() {
    let (host, Cast { pod, vip, node, backend }) = catching::<F>(proto::TCP, true);
    let comes = |flags| host.see(Hook::Ingress, &Packet::tcp(Ingress, pod, vip, flags).frame()).0;
    let seen_as = SocketAddr::new(node, 50_000);
    assert_eq!(leaves(&host, &Packet::tcp(Egress, seen_as, vip, SYN)).0, Outcome::Caught);
    let wish = host.wishes.take().pop().expect("the agent is told");
    assert_eq!((wish.pad, wish.sport.number()), (FlowKey::<F>::CAUGHT, 50_000));
    assert_eq!(comes(ACK), Outcome::NotService);
    host.now.set(host.now.get() + 10);
    let place = SocketAddr::new(vip.ip(), 50_000);
    assert_eq!(leaves(&host, &Packet::tcp(Egress, backend, place, SYN | ACK)).2, [vip, seen_as]);
    // Now it is a connection in the middle of which we come.
    assert_eq!(comes(ACK), Outcome::Opened);
}

#[test]
fn what_was_caught_behind_the_kernels_nat_is_learnt() {
    over_both([is_learnt::<V4>, is_learnt::<V6>]);
}

/// A server of the node's own answers to the VIP that stands in for its client, by a socket that is asked.
fn is_answered_by_the_nodes_own_server<F: HostFamily>() {
    let (mut host, Cast { pod, vip, node, .. }) = catching::<F>(proto::UDP, true);
    let server = SocketAddr::new(node, 53);
    host.serve(&[Service { local: vec![server], ..Service::new(vip, proto::UDP, &[server]) }]);
    let answers = |port| {
        let mut call = Call::<F>::new(SocketAddr::new(vip.ip(), port), 7);
        socket::send(&mut call, &host, Act::Send)
    };
    assert_eq!(answers(pod.port()), Outcome::SocketRefused);
    assert_eq!(leaves(&host, &Packet::udp(Egress, pod, vip)).0, Outcome::Caught);
    assert_eq!(answers(pod.port()), Outcome::NotService);
    assert_eq!(answers(pod.port() + 1), Outcome::SocketRefused);
}

#[test]
fn what_is_caught_is_answered_by_servers_of_the_node() {
    over_both([
        is_answered_by_the_nodes_own_server::<V4>,
        is_answered_by_the_nodes_own_server::<V6>,
    ]);
}

/// Without the link nothing is caught; nor what goes to the node, or is in the middle of an unknown connection.
fn is_left_alone<F: HostFamily>() {
    let (mut host, Cast { pod, vip, node, .. }) = catching::<F>(proto::TCP, true);
    let untouched = |host: &Host<F>, packet: Packet| {
        let seen = host.see(Hook::Egress, &packet.frame());
        assert_eq!(seen, (Outcome::NotService, packet.frame()));
    };
    untouched(&host, Packet::tcp(Egress, pod, vip, ACK));
    untouched(&host, Packet::tcp(Egress, pod, SocketAddr::new(node, 80), SYN));
    host.mark(F::address(vip.ip()).unwrap(), ServiceValue::NODE);
    untouched(&host, Packet::tcp(Egress, pod, vip, SYN));
    host.mark(F::address(vip.ip()).unwrap(), ServiceValue::REFUSES);
    // Who lies behind the link that his packet leaves by was not forwarded here.
    host.routes = vec![(pod.ip(), LINK)];
    untouched(&host, Packet::tcp(Egress, pod, vip, SYN));
    host.routes.clear();
    host.settings.catch_all = 0;
    untouched(&host, Packet::tcp(Egress, pod, vip, SYN));
    let [request, _] = F::ECHO;
    untouched(&host, Packet::icmp(Egress, pod.ip(), vip.ip(), [request, 0], b"hello".to_vec()));
}

#[test]
fn what_is_not_to_be_caught_is_left_alone() {
    over_both([is_left_alone::<V4>, is_left_alone::<V6>]);
}
