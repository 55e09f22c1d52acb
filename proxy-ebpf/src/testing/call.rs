//! A socket's call.

use std::net::SocketAddr;

use proxy_common::tables::Asked;
use proxy_common::{Family, Port, proto};

use super::HostFamily;
use crate::datapath::socket::Socket;

/// A socket that makes a call.
#[derive(Clone)]
pub struct Call<F: Family> {
    /// Where to.
    pub address: (F::Addr, Port),
    /// The socket's protocol.
    pub protocol: u8,
    /// The socket's cookie.
    pub cookie: u64,
    /// The cookie of its network namespace.
    pub netns: u64,
    /// The cookie of the machine's first one.
    pub initial: u64,
    /// What is kept with it.
    pub asked: Option<Asked<F>>,
    /// Whether another socket is bound where this one's call goes to.
    pub is_bound: bool,
}

impl<F: HostFamily> Call<F> {
    /// A UDP socket's call.
    ///
    /// # Panics
    /// If the address is of the other family.
    pub fn new(to: SocketAddr, cookie: u64) -> Self {
        let address =
            (F::address(to.ip()).expect("an address of the family"), Port::new(to.port()));
        Self {
            address,
            protocol: proto::UDP,
            cookie,
            netns: 1 << 40 | 7,
            initial: 1,
            asked: None,
            is_bound: false,
        }
    }

    /// Where it leads now.
    pub fn to(&self) -> SocketAddr {
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
        self.netns
    }

    fn initial_cookie(&self) -> u64 {
        self.initial
    }

    fn asked(&self) -> Option<Asked<F>> {
        self.asked
    }

    fn keep(&mut self, asked: &Asked<F>) -> bool {
        self.asked = Some(*asked);
        true
    }

    fn is_bound(&self) -> bool {
        self.is_bound
    }
}
