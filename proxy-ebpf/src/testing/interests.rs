//! What is of interest, as sets. What is in them stays, as in the kernel.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use proxy_common::Port;
use proxy_common::tables::{Kind, Kinds};

use super::bytes;

/// Addresses, servers and ports of the node's.
#[derive(Default)]
pub struct Interests {
    addresses: BTreeMap<Vec<u8>, Kinds>,
    servers: BTreeSet<(Vec<u8>, u16)>,
    ports: RefCell<BTreeSet<u16>>,
    /// Whether all bits are set: then all the rest must tell.
    pub all: bool,
}

impl Interests {
    /// Takes in what an address is.
    pub fn add(&mut self, address: &impl bytemuck::Pod, kind: Kind) {
        let kinds = self.addresses.entry(bytes(address)).or_default();
        *kinds = kinds.with(kind);
    }

    /// Takes in an endpoint.
    pub fn add_server(&mut self, address: &impl bytemuck::Pod, port: Port) {
        self.add(address, Kind::Endpoint);
        self.servers.insert((bytes(address), port.number()));
    }

    /// Takes in a port of the node's.
    pub fn take_port(&self, port: Port) {
        self.ports.borrow_mut().insert(port.number());
    }

    /// What an address may be.
    pub fn of(&self, address: &impl bytemuck::Pod) -> Kinds {
        if self.all {
            let all = [Kind::Frontend, Kind::Node, Kind::Endpoint];
            return all.into_iter().fold(Kinds::NONE, Kinds::with);
        }
        self.addresses.get(&bytes(address)).copied().unwrap_or_default()
    }

    /// Whether an endpoint may serve there.
    pub fn has_server(&self, address: &impl bytemuck::Pod, port: Port) -> bool {
        self.all || self.servers.contains(&(bytes(address), port.number()))
    }

    /// Whether a port of the node's may be of interest.
    pub fn has_port(&self, port: Port) -> bool {
        self.all || self.ports.borrow().contains(&port.number())
    }
}
