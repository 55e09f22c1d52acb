//! Which way packets go: answers to clients outside by the link that leads to them, nothing round and round, and what is the
//! host's to the host.

use std::net::{IpAddr, SocketAddr};

use proxy_common::tables::ServiceValue;
use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::testing::{Hook, LINK, NODE, Packet, Service};
use proxy_common::{Outcome, V4, V6, proto};
use proxy_ebpf::testing::{Buffer, Host, HostFamily};

use crate::{ACK, SYN, at};

/// Another link than the one that packets are seen on.
const OTHER: u32 = 7;

struct Cast {
    client: SocketAddr,
    vip: SocketAddr,
    pod: SocketAddr,
    node: IpAddr,
}

fn cast<F: HostFamily>() -> Cast {
    let is_v4 = F::BITS == 32;
    let [client, vip, pod] = if is_v4 {
        ["198.51.100.9:40000", "203.0.113.10:80", "10.244.0.7:8080"]
    } else {
        ["[2001:db8:9::9]:40000", "[2001:db8:a::10]:80", "[fd00:244::7]:8080"]
    };
    Cast { client: at(client), vip: at(vip), pod: at(pod), node: NODE[usize::from(!is_v4)] }
}

fn over_both(test: [fn(); 2]) {
    test.into_iter().for_each(|test| test());
}

/// A load balancer's IP with one pod, here or elsewhere.
fn balancing<F: HostFamily>(is_local: bool) -> (Host<F>, Cast) {
    let (mut host, cast) = (Host::<F>::new(), cast::<F>());
    let local = if is_local { vec![cast.pod] } else { Vec::new() };
    host.serve(&[Service { flags: 0, local, ..Service::new(cast.vip, proto::TCP, &[cast.pod]) }]);
    (host, cast)
}

/// What becomes of a segment, and the link that it is sent out of past the stack.
fn seen<F: HostFamily>(host: &Host<F>, hook: Hook, packet: &Packet) -> (Outcome, u32) {
    let verdict = host.verdict(hook, &mut Buffer::new(&packet.frame()));
    (verdict.outcome, verdict.link)
}

fn answers_leave_by_the_link_that_leads_to_the_client<F: HostFamily>() {
    for is_local in [false, true] {
        let (mut host, cast) = balancing::<F>(is_local);
        let asks = |flags| Packet::tcp(Ingress, cast.client, cast.vip, flags);
        let (hook, side, to, sent_on) = if is_local {
            (Hook::Egress, Egress, cast.client, Outcome::Replied)
        } else {
            let own = SocketAddr::new(cast.node, cast.client.port());
            (Hook::Uplink, Ingress, own, Outcome::Masqueraded)
        };
        let answers = |flags| Packet::tcp(side, cast.pod, to, flags);
        seen(&host, Hook::Uplink, &asks(SYN));
        // No route is known: by the link that the client came by. A local pod's answer is there already.
        let by_the_same = (sent_on, if is_local { 0 } else { LINK });
        assert_eq!(seen(&host, hook, &answers(SYN | ACK)), by_the_same);
        host.routes = vec![(cast.client.ip(), OTHER)];
        assert_eq!(seen(&host, hook, &answers(SYN | ACK)), (sent_on, OTHER));
        seen(&host, Hook::Uplink, &asks(ACK));
        // A live flow asks once a tick.
        for _ in 0..3 {
            assert_eq!(seen(&host, hook, &answers(ACK)), (sent_on, OTHER));
        }
        host.routes = vec![(cast.client.ip(), LINK)];
        host.now.set(host.now.get() + 1);
        for _ in 0..3 {
            assert_eq!(seen(&host, hook, &answers(ACK)), by_the_same);
        }
    }
}

#[test]
fn answers_leave_by_the_link_that_leads_to_the_client_of_both_families() {
    over_both([
        answers_leave_by_the_link_that_leads_to_the_client::<V4>,
        answers_leave_by_the_link_that_leads_to_the_client::<V6>,
    ]);
}

fn an_unknown_port_of_a_vip_goes_round_nowhere<F: HostFamily>() {
    let (mut host, cast) = balancing::<F>(true);
    let unknown = SocketAddr::new(cast.vip.ip(), 81);
    let asks = Packet::tcp(Ingress, cast.client, unknown, SYN);
    // It may be a machine's address, to which this host forwards.
    host.routes = vec![(cast.vip.ip(), OTHER)];
    assert_eq!(seen(&host, Hook::Uplink, &asks).0, Outcome::NotService);
    host.routes = vec![(cast.vip.ip(), LINK)];
    assert_eq!(seen(&host, Hook::Uplink, &asks).0, Outcome::Reset);
    // A pod's packets come by no link that routes lead out of.
    let pods = Packet::tcp(Ingress, cast.pod, unknown, SYN);
    assert_eq!(seen(&host, Hook::Ingress, &pods).0, Outcome::NotService);
}

#[test]
fn an_unknown_port_of_a_vip_goes_round_nowhere_of_both_families() {
    over_both([
        an_unknown_port_of_a_vip_goes_round_nowhere::<V4>,
        an_unknown_port_of_a_vip_goes_round_nowhere::<V6>,
    ]);
}

fn a_vip_that_may_be_a_machines_answers_no_ping<F: HostFamily>() {
    let (host, cast) = balancing::<F>(true);
    let head = if F::BITS == 32 { [8, 0] } else { [128, 0] };
    let ping = Packet::icmp(Ingress, cast.client.ip(), cast.vip.ip(), head, vec![1; 8]);
    assert_eq!(seen(&host, Hook::Ingress, &ping).0, Outcome::NotService);
}

#[test]
fn a_vip_that_may_be_a_machines_answers_no_ping_of_both_families() {
    over_both([
        a_vip_that_may_be_a_machines_answers_no_ping::<V4>,
        a_vip_that_may_be_a_machines_answers_no_ping::<V6>,
    ]);
}

/// `NodeLocal DNSCache`: the node has the `ClusterIP` itself, and a server that is bound to it.
fn a_cluster_ip_with_a_server_of_the_host_is_the_hosts<F: HostFamily>() {
    let (mut host, cast) = (Host::<F>::new(), cast::<F>());
    host.serve(&[Service::new(cast.vip, proto::UDP, &[cast.pod])]);
    let asks = Packet::udp(Ingress, cast.client, cast.vip);
    let own = F::address(cast.vip.ip()).unwrap();
    host.listeners = vec![cast.vip];
    assert_eq!(seen(&host, Hook::Ingress, &asks).0, Outcome::Opened, "it is not the node's");
    let others = SocketAddr::new(cast.client.ip(), 40_001);
    let asks = Packet::udp(Ingress, others, cast.vip);
    host.mark(own, ServiceValue::REFUSES | ServiceValue::NODE);
    assert_eq!(seen(&host, Hook::Ingress, &asks).0, Outcome::NotService);
    // Addresses that IPVS has left behind have no server.
    host.listeners = vec![SocketAddr::new(cast.vip.ip(), 54)];
    assert_eq!(seen(&host, Hook::Ingress, &asks).0, Outcome::Opened);
}

#[test]
fn a_cluster_ip_with_a_server_of_the_host_is_the_hosts_of_both_families() {
    over_both([
        a_cluster_ip_with_a_server_of_the_host_is_the_hosts::<V4>,
        a_cluster_ip_with_a_server_of_the_host_is_the_hosts::<V6>,
    ]);
}

/// What kube-proxy has led to its pod goes on by the kernel's table of connections.
fn connections_of_another_proxy_are_left_alone_for_a_while<F: HostFamily>() {
    let (mut host, cast) = (Host::<F>::new(), cast::<F>());
    host.serve(&[Service::new(cast.vip, proto::TCP, &[cast.pod])]);
    host.settings.takeover_until = host.now.get() + 10;
    let segment = |flags| Packet::tcp(Ingress, cast.client, cast.vip, flags);
    // A router may lead the VIP here: it is no port that goes round.
    host.routes = vec![(cast.vip.ip(), LINK)];
    for hook in [Hook::Ingress, Hook::Uplink] {
        assert_eq!(seen(&host, hook, &segment(ACK)).0, Outcome::NotService);
    }
    host.routes.clear();
    host.now.set(host.now.get() + 10);
    assert_eq!(seen(&host, Hook::Ingress, &segment(ACK)).0, Outcome::Opened);
    // New ones are ours from the start.
    host.now.set(1);
    let new = Packet::tcp(Ingress, SocketAddr::new(cast.client.ip(), 40_001), cast.vip, SYN);
    assert_eq!(seen(&host, Hook::Ingress, &new).0, Outcome::Opened);
}

#[test]
fn connections_of_another_proxy_are_left_alone_for_a_while_of_both_families() {
    over_both([
        connections_of_another_proxy_are_left_alone_for_a_while::<V4>,
        connections_of_another_proxy_are_left_alone_for_a_while::<V6>,
    ]);
}
