//! Socket calls on the host.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use proxy_common::settings::Settings;
use proxy_common::tables::{Algorithm, ServiceValue, Side};
use proxy_common::testing::{Hook, NODE, Packet, Service};
use proxy_common::{Outcome, V4, V6, proto};
use proxy_ebpf::datapath::socket::{Act, Shown, restore, send};
use proxy_ebpf::testing::{Call, Host, HostFamily};

fn ends(v6: bool) -> [SocketAddr; 4] {
    let texts = if v6 {
        ["[fd00::1]:53", "[fd01::1]:5353", "[fd01::2]:5353", "[fd01::3]:53"]
    } else {
        ["10.96.0.1:53", "10.0.0.1:5353", "10.0.0.2:5353", "10.0.0.3:53"]
    };
    texts.map(|text| text.parse().unwrap())
}

fn a_socket_is_led_to_a_backend_and_shown_the_vip<F: HostFamily>(
    [vip, one, two, other]: [SocketAddr; 4],
) {
    let mut host = Host::<F>::new();
    host.serve(&[Service::new(vip, proto::UDP, &[one, two])]);
    let mut reached = BTreeSet::new();
    for cookie in 1..50 {
        let mut call = Call::<F>::new(vip, cookie << 32 | cookie);
        assert_eq!(send(&mut call, &host, Act::Send), Outcome::SocketTranslated);
        reached.insert(call.to());
        // A socket stays with its backend.
        let mut again = Call::<F>::new(vip, cookie << 32 | cookie);
        send(&mut again, &host, Act::Send);
        assert_eq!(again.to(), call.to());
        // Another socket that speaks to the pod itself is not told of the VIP.
        let mut stranger = Call { cookie: cookie + 1000, ..call.clone() };
        assert_eq!(restore(&mut stranger, &host, Shown::Source), Outcome::NotService);
        assert_eq!(restore(&mut call, &host, Shown::Source), Outcome::SocketRestored);
        assert_eq!(call.to(), vip);
        // What is sent to the backend by a socket that was led there changes nothing; but if it connects there.
        let backend = again.to();
        send(&mut again.clone(), &host, Act::Send);
        assert_eq!(restore(&mut again.clone(), &host, Shown::Source), Outcome::SocketRestored);
        send(&mut again, &host, Act::Connect);
        assert_eq!(
            (restore(&mut again, &host, Shown::Source), again.to()),
            (Outcome::NotService, backend)
        );
    }
    assert_eq!(reached, [one, two].into());
    let mut direct = Call::<F>::new(other, 1);
    assert_eq!(send(&mut direct, &host, Act::Send), Outcome::NotService);
    assert_eq!(direct.to(), other);
}

/// A connection's socket has that with it; a table has what others asked for, each once. The endpoint may be at the node's own address.
fn what_a_socket_asked_for_is_noted_once<F: HostFamily>([vip, one, ..]: [SocketAddr; 4]) {
    let of_node = SocketAddr::new(NODE[usize::from(vip.is_ipv6())], one.port());
    [one, of_node].into_iter().for_each(|endpoint| is_noted_once::<F>(vip, endpoint));
}

fn is_noted_once<F: HostFamily>(vip: SocketAddr, one: SocketAddr) {
    let mut host = Host::<F>::new();
    host.serve(&[proto::TCP, proto::UDP].map(|number| Service::new(vip, number, &[one])));
    for (protocol, act, noted) in
        [(proto::TCP, Act::Connect, 0), (proto::UDP, Act::Connect, 1), (proto::UDP, Act::Send, 1)]
    {
        host.noted.set(0);
        let mut call = Call { protocol, ..Call::<F>::new(vip, u64::from(protocol) << 8 | noted) };
        for _ in 0..3 {
            call.address = Call::<F>::new(vip, 0).address;
            assert_eq!(send(&mut call, &host, act), Outcome::SocketTranslated);
        }
        assert_eq!(u64::from(host.noted.get()), noted, "{protocol}, {act:?}");
        assert_eq!(call.asked.is_some(), act == Act::Connect);
        for shown in [Shown::Source, Shown::Peer] {
            call.address = Call::<F>::new(one, 0).address;
            assert_eq!(restore(&mut call, &host, shown), Outcome::SocketRestored);
            assert_eq!(call.to(), vip);
        }
        // It connects to the endpoint itself.
        call.address = Call::<F>::new(one, 0).address;
        assert_eq!(send(&mut call, &host, Act::Connect), Outcome::NotService);
        for shown in [Shown::Source, Shown::Peer] {
            assert_eq!((restore(&mut call, &host, shown), call.to()), (Outcome::NotService, one));
        }
    }
}

/// One that was connected, and then sends to another VIP of the same pod, hears from that one.
fn a_datagrams_source_is_what_was_asked_last<F: HostFamily>([vip, one, _, other]: [SocketAddr; 4]) {
    let mut host = Host::<F>::new();
    host.serve(&[vip, other].map(|vip| Service::new(vip, proto::UDP, &[one])));
    let mut call = Call::<F>::new(vip, 1);
    send(&mut call, &host, Act::Connect);
    call.address = Call::<F>::new(other, 0).address;
    send(&mut call, &host, Act::Send);
    for (shown, expected) in [(Shown::Source, other), (Shown::Peer, vip)] {
        call.address = Call::<F>::new(one, 0).address;
        assert_eq!(restore(&mut call, &host, shown), Outcome::SocketRestored);
        assert_eq!(call.to(), expected, "{shown:?}");
    }
}

fn what_nobody_serves_is_refused<F: HostFamily>([vip, one, ..]: [SocketAddr; 4]) {
    let mut host = Host::<F>::new();
    host.serve(&[Service::new(vip, proto::UDP, &[one])]);
    let mut unused = Call::<F>::new(SocketAddr::new(vip.ip(), 54), 1);
    assert_eq!(send(&mut unused, &host, Act::Send), Outcome::SocketRefused);
    // A datagram socket that connects only notes where to.
    assert_eq!(send(&mut unused, &host, Act::Connect), Outcome::NotService);
    let mut tcp = Call { protocol: proto::TCP, ..Call::<F>::new(vip, 1) };
    assert_eq!(send(&mut tcp, &host, Act::Connect), Outcome::SocketRefused);
    assert_eq!(send(&mut tcp, &host, Act::Send), Outcome::SocketRefused);
    host.serve(&[Service::new(vip, proto::UDP, &[])]);
    assert_eq!(send(&mut Call::<F>::new(vip, 1), &host, Act::Send), Outcome::SocketRefused);
}

fn only_sockets_of_the_wanted_namespace_are_led<F: HostFamily>([vip, one, ..]: [SocketAddr; 4]) {
    let mut host = Host::<F>::new();
    host.serve(&[Service::new(vip, proto::UDP, &[one])]);
    let (unknown, cookie, initial) = (Settings::UNKNOWN, Settings::BY_COOKIE, Settings::INITIAL);
    for (netns, node, all, outcome) in [
        (unknown, [0, 0], 1, Outcome::SocketTranslated),
        (cookie, [7, 0], 1, Outcome::SocketTranslated),
        (cookie, [7, 1 << 8], 0, Outcome::SocketTranslated),
        (cookie, [7, 0], 0, Outcome::NotService),
        (cookie, [0, 1 << 8], 0, Outcome::NotService),
        // The machine's first namespace, which the call is not from.
        (initial, [0, 0], 0, Outcome::NotService),
        (unknown, [0, 0], 0, Outcome::NotService),
    ] {
        host.settings.netns = netns;
        (host.settings.netns_cookie, host.settings.all_sockets) = (node, all);
        assert_eq!(send(&mut Call::<F>::new(vip, 1), &host, Act::Send), outcome);
    }
    let mut own = Call::<F>::new(vip, 1);
    own.netns = own.initial;
    host.settings.netns = initial;
    assert_eq!(send(&mut own, &host, Act::Send), Outcome::SocketTranslated);
}

fn a_sockets_datagrams_stay_with_one_backend_whatever_the_algorithm<F: HostFamily>(
    [vip, one, two, _]: [SocketAddr; 4],
) {
    for by in Algorithm::ALL {
        let mut host = Host::<F>::new();
        host.serve(&[Service { flags: by.flags(), ..Service::new(vip, proto::UDP, &[one, two]) }]);
        let to = |host: &Host<F>| {
            let mut call = Call::<F>::new(vip, 1);
            assert_eq!(send(&mut call, host, Act::Send), Outcome::SocketTranslated);
            call.to()
        };
        let first = to(&host);
        *host.loads.borrow_mut() = if first == one { [(0, 9)] } else { [(1, 9)] }.into();
        for _ in 0..8 {
            assert_eq!(to(&host), first, "{by:?}");
        }
    }
}

fn a_host_port_is_at_all_addresses_of_the_node_and_at_its_loopback<F: HostFamily>(
    [vip, pod, ..]: [SocketAddr; 4],
) {
    let mut host = Host::<F>::new();
    let (any, loopback) = if vip.is_ipv4() { ("0.0.0.0", "127.0.0.1") } else { ("::", "::1") };
    let at = |ip: &str, port| SocketAddr::new(ip.parse().unwrap(), port);
    let host_port = |frontend| Service {
        flags: ServiceValue::HOST_PORT,
        local: vec![pod],
        ..Service::new(frontend, proto::UDP, &[pod])
    };
    let node = NODE[usize::from(vip.is_ipv6())];
    // The last is at an address that is not the node's: a pod can't have that.
    let own = SocketAddr::new(node, 9090);
    host.serve(&[host_port(at(any, 8080)), host_port(own), host_port(vip)]);
    host.mark(F::address(node).unwrap(), ServiceValue::NODE);
    let local = F::address(at(loopback, 0).ip()).unwrap();
    host.mark(local, ServiceValue::NODE | ServiceValue::LOOPBACK);
    host.settings.netns = Settings::BY_COOKIE;
    host.settings.netns_cookie = [7, 1 << 8];
    let call = |host: &Host<F>, to| send(&mut Call::<F>::new(to, 1), host, Act::Send);
    for to in [SocketAddr::new(node, 8080), own, at(loopback, 8080)] {
        assert_eq!(call(&host, to), Outcome::SocketTranslated, "{to}");
    }
    for to in [SocketAddr::new(node, 8081), vip, at(loopback, 9090)] {
        assert_eq!(call(&host, to), Outcome::NotService, "{to}");
    }
    // A pod's loopback is its own, and no packet means this one.
    host.settings.netns_cookie = [8, 0];
    assert_eq!(call(&host, at(loopback, 8080)), Outcome::NotService);
    let client = if vip.is_ipv4() { at("10.0.9.9", 999) } else { at("fd09::9", 999) };
    let packet = Packet::udp(Side::Ingress, client, at(loopback, 8080)).frame();
    assert_eq!(host.see(Hook::Uplink, &packet).0, Outcome::NotService);
}

#[test]
fn both_families() {
    a_socket_is_led_to_a_backend_and_shown_the_vip::<V4>(ends(false));
    a_socket_is_led_to_a_backend_and_shown_the_vip::<V6>(ends(true));
    what_a_socket_asked_for_is_noted_once::<V4>(ends(false));
    what_a_socket_asked_for_is_noted_once::<V6>(ends(true));
    a_datagrams_source_is_what_was_asked_last::<V4>(ends(false));
    a_datagrams_source_is_what_was_asked_last::<V6>(ends(true));
    what_nobody_serves_is_refused::<V4>(ends(false));
    what_nobody_serves_is_refused::<V6>(ends(true));
    only_sockets_of_the_wanted_namespace_are_led::<V4>(ends(false));
    only_sockets_of_the_wanted_namespace_are_led::<V6>(ends(true));
    a_host_port_is_at_all_addresses_of_the_node_and_at_its_loopback::<V4>(ends(false));
    a_host_port_is_at_all_addresses_of_the_node_and_at_its_loopback::<V6>(ends(true));
    a_sockets_datagrams_stay_with_one_backend_whatever_the_algorithm::<V4>(ends(false));
    a_sockets_datagrams_stay_with_one_backend_whatever_the_algorithm::<V6>(ends(true));
}
