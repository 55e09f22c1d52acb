//! Socket calls on the host.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use proxy_common::testing::Service;
use proxy_common::{Family, Outcome, Port, V4, V6, proto};
use proxy_ebpf::datapath::socket::{Socket, restore, send};

use crate::host::{Host, HostFamily};

/// A socket that makes a call.
#[derive(Clone)]
struct Call<F: Family> {
    address: (F::Addr, Port),
    protocol: u8,
    cookie: u64,
}

impl<F: HostFamily> Call<F> {
    fn new(to: SocketAddr, cookie: u64) -> Self {
        let address = (F::address(to.ip()).unwrap(), Port::new(to.port()));
        Self { address, protocol: proto::UDP, cookie }
    }

    fn to(&self) -> SocketAddr {
        SocketAddr::new(self.address.0.into(), self.address.1.number())
    }
}

impl<F: Family> Socket<F> for Call<F> {
    fn address(&self) -> (F::Addr, Port) {
        self.address
    }

    fn set_address(&mut self, address: F::Addr, port: Port) {
        self.address = (address, port);
    }

    fn protocol(&self) -> u8 {
        self.protocol
    }

    fn cookie(&self) -> u64 {
        self.cookie
    }

    fn netns_cookie(&self) -> u64 {
        1 << 40 | 7
    }
}

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
        assert_eq!(send(&mut call, &host), Outcome::SocketTranslated);
        reached.insert(call.to());
        // A socket stays with its backend.
        let mut again = Call::<F>::new(vip, cookie << 32 | cookie);
        send(&mut again, &host);
        assert_eq!(again.to(), call.to());
        // Another socket that speaks to the pod itself is not told of the VIP.
        let mut stranger = Call { cookie: cookie + 1000, ..call.clone() };
        assert_eq!(restore(&mut stranger, &host), Outcome::NotService);
        assert_eq!(restore(&mut call, &host), Outcome::SocketRestored);
        assert_eq!(call.to(), vip);
    }
    assert_eq!(reached, [one, two].into());
    let mut direct = Call::<F>::new(other, 1);
    assert_eq!(send(&mut direct, &host), Outcome::NotService);
    assert_eq!(direct.to(), other);
}

fn what_nobody_serves_is_refused<F: HostFamily>([vip, one, ..]: [SocketAddr; 4]) {
    let mut host = Host::<F>::new();
    host.serve(&[Service::new(vip, proto::UDP, &[one])]);
    let mut unused = Call::<F>::new(SocketAddr::new(vip.ip(), 54), 1);
    assert_eq!(send(&mut unused, &host), Outcome::SocketRefused);
    let mut tcp = Call { protocol: proto::TCP, ..Call::<F>::new(vip, 1) };
    assert_eq!(send(&mut tcp, &host), Outcome::SocketRefused);
    host.serve(&[Service::new(vip, proto::UDP, &[])]);
    assert_eq!(send(&mut Call::<F>::new(vip, 1), &host), Outcome::SocketRefused);
}

fn only_sockets_of_the_wanted_namespace_are_led<F: HostFamily>([vip, one, ..]: [SocketAddr; 4]) {
    let mut host = Host::<F>::new();
    host.serve(&[Service::new(vip, proto::UDP, &[one])]);
    for (wanted, outcome) in [
        ([0, 0], Outcome::SocketTranslated),
        ([7, 1 << 8], Outcome::SocketTranslated),
        ([7, 0], Outcome::NotService),
        ([0, 1 << 8], Outcome::NotService),
    ] {
        host.settings.netns_cookie = wanted;
        assert_eq!(send(&mut Call::<F>::new(vip, 1), &host), outcome);
    }
}

#[test]
fn both_families() {
    a_socket_is_led_to_a_backend_and_shown_the_vip::<V4>(ends(false));
    a_socket_is_led_to_a_backend_and_shown_the_vip::<V6>(ends(true));
    what_nobody_serves_is_refused::<V4>(ends(false));
    what_nobody_serves_is_refused::<V6>(ends(true));
    only_sockets_of_the_wanted_namespace_are_led::<V4>(ends(false));
    only_sockets_of_the_wanted_namespace_are_led::<V6>(ends(true));
}
