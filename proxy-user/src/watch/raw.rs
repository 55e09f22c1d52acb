//! Kubernetes objects, trimmed to the fields that Portal reads (kube-proxy.md 1.P).
//!
//! They cannot fail to parse, whatever an object contains: every field is optional and of the widest
//! type, and a field of another shape counts as absent. A parse failure would make an object vanish
//! from a streamed list, as if it had been deleted. What the fields mean, and what is wrong with them,
//! is decided in [`crate::model::from_k8s`].

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// Reads a small field: null, a wrong shape or a wrong type is the default.
fn small<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned + Default,
{
    let value = Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).unwrap_or_default())
}

/// Reads labels or annotations. In hand-written YAML a value may be a number or a boolean: its text counts.
fn labels<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: Deserializer<'de>,
{
    let Value::Object(labels) = Value::deserialize(deserializer)? else {
        return Ok(BTreeMap::new());
    };
    let text = |value: Value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    Ok(labels.into_iter().map(|(name, value)| (name, text(value))).collect())
}

/// Reads an object, or the default if it is something else. Unlike [`small`] it buffers nothing:
/// metadata carries kilobytes that nobody here reads.
fn object<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Lenient::deserialize(deserializer).map(|Lenient(value)| value)
}

/// Reads a list of objects, or an empty one if it is something else.
fn objects<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    List::deserialize(deserializer).map(|List(values)| values)
}

struct Lenient<T>(T);
struct List<T>(Vec<T>);

struct LenientVisitor<T>(PhantomData<T>);
struct ListVisitor<T>(PhantomData<T>);

/// The scalars that may stand where something else is expected, all answered by `$default`.
macro_rules! scalars_are {
    ($default:expr) => {
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("anything")
        }
        fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
            Ok($default)
        }
        fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
            Ok($default)
        }
        fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
            Ok($default)
        }
        fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
            Ok($default)
        }
        fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
            Ok($default)
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok($default)
        }
    };
}

impl<'de, T: Deserialize<'de> + Default> Visitor<'de> for LenientVisitor<T> {
    type Value = Lenient<T>;

    scalars_are!(Lenient(T::default()));

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Lenient)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Lenient(T::default()))
    }
}

impl<'de, T: Deserialize<'de> + Default> Visitor<'de> for ListVisitor<T> {
    type Value = List<T>;

    scalars_are!(List(Vec::new()));

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(List(Vec::new()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Lenient(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(List(values))
    }
}

impl<'de, T: Deserialize<'de> + Default> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LenientVisitor(PhantomData))
    }
}

impl<'de, T: Deserialize<'de> + Default> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ListVisitor(PhantomData))
    }
}

macro_rules! raw {
    ($($(#[$doc:meta])+ $name:ident { $($(#[$attribute:meta])* $field:ident: $type:ty = $with:literal,)+ })+) => {$(
        $(#[$doc])+
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(default, rename_all = "camelCase")]
        #[allow(missing_docs, reason = "the fields are those of the Kubernetes API")]
        pub struct $name {
            $(#[serde(deserialize_with = $with)] $(#[$attribute])* pub $field: $type,)+
        }
    )+};
}

raw! {
    /// `ObjectMeta`.
    Meta {
        name: String = "small",
        namespace: String = "small",
        uid: String = "small",
        resource_version: String = "small",
        creation_timestamp: String = "small",
        deletion_timestamp: Option<String> = "small",
        labels: BTreeMap<String, String> = "labels",
        annotations: BTreeMap<String, String> = "labels",
    }
    /// A Service.
    Service {
        metadata: Meta = "object",
        spec: ServiceSpec = "object",
        status: ServiceStatus = "object",
    }
    /// `ServiceSpec`.
    ServiceSpec {
        r#type: String = "small",
        #[serde(rename = "clusterIP")]
        cluster_ip: String = "small",
        #[serde(rename = "clusterIPs")]
        cluster_ips: Vec<String> = "small",
        ip_families: Vec<String> = "small",
        ports: Vec<ServicePort> = "objects",
        #[serde(rename = "externalIPs")]
        external_ips: Vec<String> = "small",
        session_affinity: String = "small",
        session_affinity_config: AffinityConfig = "object",
        external_traffic_policy: String = "small",
        internal_traffic_policy: String = "small",
        load_balancer_source_ranges: Vec<String> = "small",
        health_check_node_port: i64 = "small",
    }
    /// `SessionAffinityConfig`.
    AffinityConfig {
        #[serde(rename = "clientIP")]
        client_ip: ClientIpConfig = "object",
    }
    /// `ClientIPConfig`.
    ClientIpConfig {
        timeout_seconds: Option<i64> = "small",
    }
    /// `ServiceStatus`.
    ServiceStatus {
        load_balancer: LoadBalancer = "object",
    }
    /// `LoadBalancerStatus`.
    LoadBalancer {
        ingress: Vec<Ingress> = "objects",
    }
    /// `LoadBalancerIngress`.
    Ingress {
        ip: String = "small",
        ip_mode: String = "small",
    }
    /// `ServicePort`.
    ServicePort {
        name: String = "small",
        protocol: Option<String> = "small",
        port: i64 = "small",
        node_port: i64 = "small",
    }
    /// An `EndpointSlice`.
    EndpointSlice {
        metadata: Meta = "object",
        address_type: String = "small",
        ports: Vec<EndpointPort> = "objects",
        endpoints: Vec<Endpoint> = "objects",
    }
    /// `EndpointPort`.
    EndpointPort {
        name: Option<String> = "small",
        protocol: Option<String> = "small",
        port: Option<i64> = "small",
    }
    /// `Endpoint`.
    Endpoint {
        addresses: Vec<String> = "small",
        conditions: Conditions = "object",
        node_name: Option<String> = "small",
        hints: Hints = "object",
    }
    /// `EndpointHints`.
    Hints {
        for_zones: Vec<Hint> = "objects",
        for_nodes: Vec<Hint> = "objects",
    }
    /// `ForZone` and `ForNode`.
    Hint {
        name: String = "small",
    }
    /// `EndpointConditions`.
    Conditions {
        ready: Option<bool> = "small",
        serving: Option<bool> = "small",
        terminating: Option<bool> = "small",
    }
    /// A Pod.
    Pod {
        metadata: Meta = "object",
        spec: PodSpec = "object",
        status: PodStatus = "object",
    }
    /// `PodSpec`.
    PodSpec {
        node_name: String = "small",
        host_network: bool = "small",
        containers: Vec<Container> = "objects",
        init_containers: Vec<Container> = "objects",
    }
    /// `Container`.
    Container {
        restart_policy: String = "small",
        ports: Vec<ContainerPort> = "objects",
    }
    /// `ContainerPort`.
    ContainerPort {
        container_port: i64 = "small",
        host_port: i64 = "small",
        #[serde(rename = "hostIP")]
        host_ip: String = "small",
        protocol: Option<String> = "small",
    }
    /// `PodStatus`.
    PodStatus {
        phase: String = "small",
        #[serde(rename = "podIP")]
        pod_ip: String = "small",
        #[serde(rename = "podIPs")]
        pod_ips: Vec<PodIp> = "objects",
    }
    /// `PodIP`.
    PodIp {
        ip: String = "small",
    }
    /// A Node.
    Node {
        metadata: Meta = "object",
        spec: NodeSpec = "object",
        status: NodeStatus = "object",
    }
    /// `NodeSpec`.
    NodeSpec {
        taints: Vec<Taint> = "objects",
    }
    /// `Taint`.
    Taint {
        key: String = "small",
    }
    /// `NodeStatus`.
    NodeStatus {
        addresses: Vec<NodeAddress> = "objects",
    }
    /// `NodeAddress`.
    NodeAddress {
        r#type: String = "small",
        address: String = "small",
    }
}
