//! The bits by which the datapath knows which packets are of interest (`proxy_common::tables::interest`). They are set
//! before what they stand for is written, and stay: an agent that finds the maps of an earlier one finds them set.

use std::io;
use std::path::Path;

use anyhow::Result;
use proxy_common::tables::{Interest, Kind, Ports, ServiceKey, Spot};
use proxy_common::{Address, Family, Port};

use super::mapped::Mapped;
use super::writer::open_mapped;

/// One family's bits.
pub struct Interests {
    spots: Mapped<Interest>,
    ports: Mapped<Ports>,
}

impl Interests {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// If they can't be opened.
    pub fn open<F: Family>(maps: &Path) -> Result<Self> {
        let spots = open_mapped(maps, &super::name_of::<F>("interest"))?;
        Ok(Self { spots, ports: open_mapped(maps, "ports")? })
    }

    /// Gives back the memory that they take up while they are written to.
    pub fn unmap(&mut self) {
        self.spots.unmap();
        self.ports.unmap();
    }

    /// Sets the bit of an address.
    ///
    /// # Errors
    /// If the map can't be written.
    pub fn add(&self, address: &impl Address, kind: Kind) -> io::Result<()> {
        self.set(Spot::of(address), kind)
    }

    /// Sets the bits of an endpoint's address and port.
    ///
    /// # Errors
    /// If the map can't be written.
    pub fn add_endpoint(&self, address: &impl Address, port: Port) -> io::Result<()> {
        self.set(Spot::of(address), Kind::Endpoint)?;
        self.set(Spot::of_server(address, port), Kind::Server)
    }

    /// Sets the bit of a frontend, or of an address's mark.
    ///
    /// # Errors
    /// If the map can't be written.
    pub fn add_service<F: Family>(&self, key: &ServiceKey<F>, flags: u32) -> io::Result<()> {
        let Some(kind) = key.interest(flags) else {
            let (element, half) = Ports::place(key.port);
            // The datapath may write the other words meanwhile.
            return self.ports.set_word(element, Ports::SERVED + half, 1);
        };
        self.add(&key.vip, kind)
    }

    fn set(&self, Spot { element, bit }: Spot, kind: Kind) -> io::Result<()> {
        let mut spot = self.spots.get(element)?;
        spot.words[kind as usize] |= 1 << bit;
        self.spots.set(element, spot)
    }
}
