//! The datapath on the host.

mod algorithms;
mod cases;
mod catch;
mod direct;
mod guard;
mod interleave;
mod life;
mod masquerade;
mod properties;
mod search;
mod sockets;
mod ways;

use std::net::SocketAddr;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Runs a test of each family.
fn over_both(tests: [fn(); 2]) {
    tests.into_iter().for_each(|test| test());
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn client() -> SocketAddr {
    at("10.0.0.1:40000")
}

fn vip() -> SocketAddr {
    at("10.96.0.1:80")
}

fn pod() -> SocketAddr {
    at("10.0.1.1:8080")
}
