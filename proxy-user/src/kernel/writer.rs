//! The one writer of Services: planned writes become stores and system calls, in their order.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::tables::{self, Name, Range, ServiceKey, ServiceValue};
use proxy_common::{Family, Port, V4, V6};

use super::mapped::Mapped;
use super::read::{FromIp, read_actual};
use crate::desired::{Frontend, PortId};
use crate::model::IpFamily;
use crate::plan::{Actual, BackendEntry, Capacity, Op};

/// One family's tables.
pub struct FamilyTables<F: Family> {
    pub services: HashMap<MapData, ServiceKey<F>, ServiceValue>,
    pub backends: Mapped<tables::Backend<F>>,
}

/// All tables that the agent writes.
pub struct Writer {
    pub v4: FamilyTables<V4>,
    pub v6: FamilyTables<V6>,
    pub names: HashMap<MapData, u32, Name>,
    pub slots: Mapped<u64>,
    services: u32,
}

fn open(maps: &Path, name: &str) -> Result<MapData> {
    let path: PathBuf = maps.join(name);
    MapData::from_pin(&path).with_context(|| format!("cannot open the map {}", path.display()))
}

fn open_mapped<T: bytemuck::Pod>(maps: &Path, name: &str) -> Result<Mapped<T>> {
    let map = open(maps, name)?;
    let length = map.info()?.max_entries();
    Mapped::new(map.fd(), length).with_context(|| format!("cannot map {name} into memory"))
}

impl<F: Family> FamilyTables<F> {
    fn open(maps: &Path) -> Result<Self> {
        let services = open(maps, &super::name_of::<F>("services"))?;
        Ok(Self {
            services: HashMap::try_from(Map::HashMap(services))?,
            backends: open_mapped(maps, &super::name_of::<F>("backends"))?,
        })
    }

    fn write_backend(&self, number: u32, entry: BackendEntry)
    where
        F::Addr: FromIp,
    {
        let Some(addr) = F::Addr::from_ip(entry.address.ip()) else { return };
        let serving = if entry.serving { tables::Backend::<F>::SERVING } else { 0 };
        let local = if entry.local { tables::Backend::<F>::LOCAL } else { 0 };
        self.backends.set(
            number,
            tables::Backend {
                addr,
                port: Port::new(entry.address.port()),
                generation: entry.generation,
                flags: serving | local,
                service: entry.service,
            },
        );
    }

    fn put(&mut self, key: ServiceKey<F>, id: u32, range: Range) -> Result<()> {
        let value = ServiceValue { tag: key.tag(), id, cluster: range };
        self.services.insert(key, value, 0).context("cannot write a Service")
    }

    fn remove(&mut self, key: ServiceKey<F>) -> Result<()> {
        match self.services.remove(&key) {
            Ok(()) | Err(aya::maps::MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(error).context("cannot remove a Service"),
        }
    }
}

/// Runs an expression with the tables of an address's family and the address in them.
macro_rules! with_family {
    ($writer:expr, $ip:expr, |$tables:ident, $address:ident| $body:expr) => {
        match $ip {
            std::net::IpAddr::V4(address) => {
                let ($tables, $address) = (&mut $writer.v4, address.into());
                $body
            }
            std::net::IpAddr::V6(address) => {
                let ($tables, $address) = (&mut $writer.v6, address.into());
                $body
            }
        }
    };
}

impl Writer {
    /// Opens the pinned maps.
    pub fn open(maps: &Path) -> Result<Self> {
        let names = open(maps, "names")?;
        let services = names.info()?.max_entries();
        Ok(Self {
            v4: FamilyTables::open(maps)?,
            v6: FamilyTables::open(maps)?,
            names: HashMap::try_from(Map::HashMap(names))?,
            slots: open_mapped(maps, "slots")?,
            services,
        })
    }

    /// How much the tables hold.
    pub fn capacity(&self) -> Capacity {
        Capacity {
            services: self.services,
            slots: self.slots.length(),
            backends: self.v4.backends.length().min(self.v6.backends.length()),
        }
    }

    /// What the tables hold.
    pub fn actual(&self) -> Result<Actual> {
        read_actual(self)
    }

    /// Carries out one write.
    pub fn apply(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Backend { family: IpFamily::V4, number, backend } => {
                self.v4.write_backend(*number, *backend);
            }
            Op::Backend { family: IpFamily::V6, number, backend } => {
                self.v6.write_backend(*number, *backend);
            }
            Op::Slot { index, number } => self.slots.set(*index, u64::from(*number)),
            Op::Name { id, port } => {
                self.names.insert(id, name_of(port), 0).context("cannot write a name")?;
            }
            Op::Unname { id } => {
                let _ = self.names.remove(id);
            }
            Op::Lead { frontend, id, range } => return self.lead(*frontend, *id, *range),
            Op::Remove { frontend } => {
                let Frontend { vip, port, protocol } = *frontend;
                return with_family!(self, vip, |tables, address| tables.remove(ServiceKey::new(
                    address,
                    Port::new(port),
                    protocol.number()
                )));
            }
            Op::MarkVip { vip } => {
                return with_family!(self, *vip, |tables, address| tables.put(
                    ServiceKey::vip(address),
                    0,
                    Range::default()
                ));
            }
            Op::UnmarkVip { vip } => {
                return with_family!(self, *vip, |tables, address| tables
                    .remove(ServiceKey::vip(address)));
            }
        }
        Ok(())
    }

    fn lead(&mut self, frontend: Frontend, id: u32, range: Range) -> Result<()> {
        // What the programs find behind the frontend must be there first.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        let Frontend { vip, port, protocol } = frontend;
        with_family!(self, vip, |tables, address| tables.put(
            ServiceKey::new(address, Port::new(port), protocol.number()),
            id,
            range
        ))
    }
}

/// A Service port's name as the map holds it. Kubernetes' names are at most 63 bytes long.
fn name_of(port: &PortId) -> Name {
    let field = |text: &str| {
        let mut bytes = [0; 64];
        let length = text.len().min(bytes.len() - 1);
        bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
        bytes
    };
    Name {
        namespace: field(&port.service.namespace),
        service: field(&port.service.name),
        port: field(&port.port),
        proto: port.protocol.number(),
        pad: [0; 7],
    }
}
