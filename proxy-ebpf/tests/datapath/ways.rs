//! Which way packets go: answers to clients outside by the link that leads to them, nothing round and round, and what is the
//! host's to the host.

use std::net::{IpAddr, SocketAddr};

use proxy_common::tables::ServiceValue;
use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::testing::{Hook, LINK, NODE, Packet, Service, ends};
use proxy_common::{Outcome, V4, V6, proto};
use proxy_ebpf::testing::{Buffer, Host, HostFamily};

use crate::{ACK, FIN, RST, SYN, at, over_both};

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
    let (mut host, cast) = balancing::<F>(true);
    let asks = |flags| Packet::tcp(Ingress, cast.client, cast.vip, flags);
    let answers = |flags| Packet::tcp(Egress, cast.pod, cast.client, flags);
    seen(&host, Hook::Uplink, &asks(SYN));
    // No route is known: by the link that the host stack has chosen.
    let by_the_same = (Outcome::Replied, 0);
    let by_the_other = (Outcome::Replied, OTHER);
    assert_eq!(seen(&host, Hook::Egress, &answers(SYN | ACK)), by_the_same);
    host.routes = vec![(cast.client.ip(), OTHER)];
    assert_eq!(seen(&host, Hook::Egress, &answers(SYN | ACK)), by_the_other);
    seen(&host, Hook::Uplink, &asks(ACK));
    // A live flow asks once a tick.
    for _ in 0..3 {
        assert_eq!(seen(&host, Hook::Egress, &answers(ACK)), by_the_other);
    }
    host.routes = vec![(cast.client.ip(), LINK)];
    host.now.set(host.now.get() + 1);
    for _ in 0..3 {
        assert_eq!(seen(&host, Hook::Egress, &answers(ACK)), by_the_same);
    }
}

#[test]
fn answers_leave_by_the_link_that_leads_to_the_client_of_both_families() {
    over_both([
        answers_leave_by_the_link_that_leads_to_the_client::<V4>,
        answers_leave_by_the_link_that_leads_to_the_client::<V6>,
    ]);
}

/// A connection from outside to a pod elsewhere, some ticks old, and who is who in it.
struct Passing<F: HostFamily> {
    host: Host<F>,
    cast: Cast,
    seen_as: SocketAddr,
}

impl<F: HostFamily> Passing<F> {
    fn connected() -> Self {
        let (mut host, cast) = balancing::<F>(false);
        host.settings.short_cut = 1;
        host.routes = vec![(cast.client.ip(), LINK)];
        let seen_as = SocketAddr::new(cast.node, cast.client.port());
        let this = Self { host, cast, seen_as };
        this.asks(SYN);
        this.answers(SYN | ACK);
        for _ in 0..2 {
            this.exchange();
            assert_eq!(this.host.grant(), 0, "it goes by the stack at first");
            this.host.now.set(this.host.now.get() + 1);
        }
        this
    }

    /// The same with a short cut, and in the middle of a tick.
    fn shortened() -> Self {
        let this = Self::connected();
        this.exchange();
        assert_eq!(this.host.grant(), 1);
        assert_eq!(this.exchange(), BY_STACK, "to see whether it still lets them pass");
        this
    }

    fn ask(&self, flags: u8) -> Packet {
        Packet::tcp(Ingress, self.cast.client, self.cast.vip, flags)
    }

    fn answer(&self, flags: u8) -> Packet {
        Packet::tcp(Ingress, self.cast.pod, self.seen_as, flags)
    }

    /// A segment of the client passes the node, as the pod gets it.
    fn asks(&self, flags: u8) -> Outcome {
        let (outcome, frame) = self.host.pass(&self.ask(flags).frame());
        assert_eq!(ends(&frame), [self.seen_as, self.cast.pod]);
        outcome
    }

    /// A segment of the pod passes the node, as the client gets it.
    fn answers(&self, flags: u8) -> Outcome {
        let (outcome, frame) = self.host.pass(&self.answer(flags).frame());
        assert_eq!(ends(&frame), [self.cast.vip, self.cast.client]);
        outcome
    }

    /// What becomes of a segment of either.
    fn exchange(&self) -> [Outcome; 2] {
        [self.asks(ACK), self.answers(ACK)]
    }

    fn next_tick(&self) {
        self.host.now.set(self.host.now.get() + 1);
    }
}

const BY_STACK: [Outcome; 2] = [Outcome::Masqueraded, Outcome::Replied];
const SHORT: [Outcome; 2] = [Outcome::ShortCut; 2];

fn a_short_cut_takes_all_but_one_packet_in_a_tick<F: HostFamily>() {
    let this = Passing::<F>::shortened();
    for _ in 0..5 {
        assert_eq!([this.exchange(), this.exchange()], [SHORT, SHORT]);
        let verdict = this.host.verdict(Hook::Uplink, &mut Buffer::new(&this.ask(ACK).frame()));
        assert_eq!((verdict.link, verdict.way), (LINK, 1));
        this.next_tick();
        assert_eq!(this.exchange(), BY_STACK);
    }
    // After a pause, too.
    this.host.now.set(this.host.now.get() + 1000);
    assert_eq!([this.exchange(), this.exchange()], [BY_STACK, SHORT]);
    assert_eq!(this.host.relayed.get(), 5 * 5 + 2, "before the host stack, where there is XDP");
    // It ends by the stack, which learns of it, and another one begins.
    assert_eq!(this.asks(FIN | ACK), Outcome::Masqueraded);
    assert_eq!(this.answers(FIN | ACK), Outcome::Replied);
    assert_eq!(this.host.flows(), 0);
    assert_eq!([this.asks(SYN), this.answers(SYN | ACK)], BY_STACK);
}

/// What the host stack does not let pass ends the short cut, in the next tick.
fn what_the_stack_drops_takes_no_short_cut<F: HostFamily>() {
    let over = |this: &Passing<F>| [this.exchange(), this.exchange()] == [BY_STACK, BY_STACK];
    let this = Passing::<F>::shortened();
    this.next_tick();
    // A packet of the client that came in and did not leave.
    this.host.see(Hook::Uplink, &this.ask(ACK).frame());
    this.next_tick();
    assert!(over(&this), "the client's is dropped");
    let this = Passing::<F>::shortened();
    this.next_tick();
    this.host.see(Hook::Uplink, &this.answer(ACK).frame());
    this.next_tick();
    assert!(over(&this), "the pod's is dropped");
    // A policy by marks came into force.
    let this = Passing::<F>::shortened();
    this.next_tick();
    let mut marked = Buffer::new(&this.ask(ACK).frame());
    this.host.see_buffer(Hook::Uplink, &mut marked);
    marked.mark = 7;
    this.host.see_buffer(Hook::Egress, &mut marked);
    this.next_tick();
    assert!(over(&this), "marked");
    // Later it is asked for anew, and given if all is well again.
    for _ in 0..40 {
        this.next_tick();
        this.exchange();
    }
    assert_eq!(this.host.grant(), 1);
    assert_eq!([this.exchange(), this.exchange()], [BY_STACK, SHORT]);
    // Another way leads to the pod than the one that the stack takes.
    let mut this = this;
    this.host.way.link = OTHER;
    this.next_tick();
    assert!(over(&this), "another way");
}

/// A firewall that lets the client's packets pass and not the answers: no short cut comes back for them.
fn what_is_dropped_on_its_way_back_gets_no_short_cut<F: HostFamily>() {
    let this = Passing::<F>::shortened();
    for _ in 0..100 {
        this.next_tick();
        this.asks(ACK);
        let (outcome, _) = this.host.see(Hook::Uplink, &this.answer(ACK).frame());
        assert_eq!(outcome, Outcome::Masqueraded, "by the stack, which drops it");
        assert_eq!(this.host.grant(), 0);
    }
}

/// A route by the client's address leads to another gateway on the same link than the node's own packets go by.
fn what_goes_by_another_gateway_takes_no_short_cut<F: HostFamily>() {
    let mut this = Passing::<F>::connected();
    this.host.way.hop = F::address(this.cast.node).unwrap();
    this.exchange();
    assert_eq!(this.host.grant(), 0);
    let mut this = Passing::<F>::shortened();
    this.host.way.hop = F::address(this.cast.node).unwrap();
    this.next_tick();
    this.exchange();
    this.next_tick();
    assert_eq!([this.exchange(), this.exchange()], [BY_STACK, BY_STACK]);
    // Nor does what has one when it is switched off.
    let mut this = Passing::<F>::shortened();
    this.host.settings.short_cut = 0;
    this.next_tick();
    assert_eq!([this.exchange(), this.exchange()], [BY_STACK, BY_STACK]);
}

/// The connection to the pod has ended, unseen by its client's end of the short cut, and another one goes by another port: the
/// old one may be someone else's.
fn a_short_cut_ends_with_what_it_cuts<F: HostFamily>() {
    let (mut host, cast) = balancing::<F>(false);
    host.settings.short_cut = 1;
    host.routes = vec![(cast.client.ip(), LINK)];
    let neighbour = at(if F::BITS == 32 { "198.51.100.8:40000" } else { "[2001:db8:9::8]:40000" });
    let asks = |client, flags| {
        let (_, frame) = host.pass(&Packet::tcp(Ingress, client, cast.vip, flags).frame());
        ends(&frame)[0]
    };
    let answers = |seen_as, flags| {
        host.pass(&Packet::tcp(Ingress, cast.pod, seen_as, flags).frame());
    };
    // The neighbour has the port first, and lets it go.
    let first = asks(neighbour, SYN);
    let old = asks(cast.client, SYN);
    assert_eq!((first.port(), old.port() == 40000), (40000, false));
    answers(first, SYN | ACK);
    asks(neighbour, ACK);
    asks(neighbour, FIN | ACK);
    answers(first, FIN | ACK);
    answers(old, SYN | ACK);
    for _ in 0..4 {
        asks(cast.client, ACK);
        answers(old, ACK);
        host.now.set(host.now.get() + 1);
    }
    asks(cast.client, ACK);
    answers(old, ACK);
    assert_eq!(host.grant(), 1);
    host.now.set(host.now.get() + 100);
    asks(cast.client, ACK);
    answers(old, ACK);
    // Past the node's way in, as one who is in the pods' network can do.
    host.see(Hook::Egress, &Packet::tcp(Egress, cast.client, cast.pod, RST).frame());
    let new = asks(cast.client, SYN);
    assert_eq!(new.port(), 40000);
    answers(new, SYN | ACK);
    // Not plain, so that it goes by the stack.
    host.pass(&Packet::tcp(Ingress, cast.client, cast.vip, ACK).with_options().frame());
    for _ in 0..3 {
        host.now.set(host.now.get() + 1);
        assert_eq!([asks(cast.client, ACK), asks(cast.client, ACK)], [new, new]);
        answers(new, ACK);
    }
}

fn what_is_not_plain_goes_by_the_stack<F: HostFamily>() {
    let mut this = Passing::<F>::shortened();
    let headers = if F::BITS == 32 { 40 } else { 60 };
    for (length, outcome) in [(1400, Outcome::ShortCut), (1401, Outcome::Forwarded)] {
        let long = this.ask(ACK).with_payload(&vec![7; length - headers]);
        assert_eq!(seen(&this.host, Hook::Uplink, &long).0, outcome, "{length}");
    }
    let last_hop = Packet { hops: 1, ..this.ask(ACK) };
    assert_eq!(seen(&this.host, Hook::Uplink, &last_hop).0, Outcome::Forwarded);
    let hops = Packet { hops: 2, ..this.ask(ACK) };
    let (outcome, frame) = this.host.see(Hook::Uplink, &hops.frame());
    let arrived = Packet { src: this.seen_as, dst: this.cast.pod, hops: 1, ..hops };
    assert_eq!((outcome, frame), (Outcome::ShortCut, arrived.frame()));
    // Nothing leads there any more.
    this.host.way.link = 0;
    assert_eq!(this.host.see(Hook::Uplink, &this.ask(ACK).frame()).0, Outcome::Forwarded);
}

fn who_gets_no_short_cut<F: HostFamily>() {
    // Nobody, if that is switched off.
    let mut this = Passing::<F>::connected();
    this.host.settings.short_cut = 0;
    this.exchange();
    assert_eq!(this.host.grant(), 0);
    // Whose answers are marked.
    this.host.settings.short_cut = 1;
    let mut answer = Buffer::new(&this.answer(ACK).frame());
    this.next_tick();
    this.host.see_buffer(Hook::Uplink, &mut answer);
    answer.mark = 7;
    this.host.see_buffer(Hook::Egress, &mut answer);
    this.asks(ACK);
    assert_eq!(this.host.wishes.borrow().len(), 1);
    assert_eq!(this.host.grant(), 0);
}

#[test]
fn short_cuts_of_both_families() {
    over_both([
        a_short_cut_takes_all_but_one_packet_in_a_tick::<V4>,
        a_short_cut_takes_all_but_one_packet_in_a_tick::<V6>,
    ]);
    over_both([
        what_the_stack_drops_takes_no_short_cut::<V4>,
        what_the_stack_drops_takes_no_short_cut::<V6>,
    ]);
    over_both([
        what_is_dropped_on_its_way_back_gets_no_short_cut::<V4>,
        what_is_dropped_on_its_way_back_gets_no_short_cut::<V6>,
    ]);
    over_both([
        what_goes_by_another_gateway_takes_no_short_cut::<V4>,
        what_goes_by_another_gateway_takes_no_short_cut::<V6>,
    ]);
    over_both([a_short_cut_ends_with_what_it_cuts::<V4>, a_short_cut_ends_with_what_it_cuts::<V6>]);
    over_both([
        what_is_not_plain_goes_by_the_stack::<V4>,
        what_is_not_plain_goes_by_the_stack::<V6>,
    ]);
    over_both([who_gets_no_short_cut::<V4>, who_gets_no_short_cut::<V6>]);
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
