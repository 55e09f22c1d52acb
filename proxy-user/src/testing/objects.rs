//! Kubernetes objects as JSON, shaped as a real API server's.

use std::net::IpAddr;

use serde_json::{Value, json};

/// A Service port: name, protocol, number.
pub type Port<'a> = (&'a str, &'a str, u16);

/// A Service in namespace `default`.
pub fn service(name: &str, cluster_ips: &[IpAddr], ports: &[Port<'_>]) -> Value {
    let families: Vec<&str> =
        cluster_ips.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
    let ports: Vec<Value> = ports
        .iter()
        .map(|(name, protocol, port)| {
            json!({"name": name, "protocol": protocol, "port": port, "targetPort": 8080})
        })
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": format!("service-{name}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ips.first(),
            "clusterIPs": cluster_ips,
            "ipFamilies": families,
            "ipFamilyPolicy": if families.len() > 1 { "RequireDualStack" } else { "SingleStack" },
            "ports": ports,
            "selector": {"app": name},
            "sessionAffinity": "None",
            "internalTrafficPolicy": "Cluster",
        },
        "status": {"loadBalancer": {}},
    })
}

/// The `NodePort` of [`node_ports`].
pub const NODE_PORT: u16 = 30_080;

/// The fields that make a Service with two ports one with a `NodePort`, the same for both protocols.
pub fn node_ports() -> Value {
    json!({"spec": {"type": "NodePort", "ports": [{"nodePort": NODE_PORT}, {"nodePort": NODE_PORT}]}})
}

/// A ready endpoint on a node.
pub fn endpoint(address: IpAddr, node: &str) -> Value {
    json!({
        "addresses": [address],
        "conditions": {"ready": true, "serving": true, "terminating": false},
        "nodeName": node,
        "targetRef": {"kind": "Pod", "namespace": "default", "name": format!("pod-{address}")},
    })
}

/// A slice of a Service in namespace `default`. Nulls stand where a Go server writes them.
pub fn slice(name: &str, service: &str, ports: &[Port<'_>], endpoints: &[Value]) -> Value {
    let v6 = endpoints.iter().any(|e| e["addresses"][0].as_str().is_some_and(|a| a.contains(':')));
    let ports: Vec<Value> = ports
        .iter()
        .map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "port": port}))
        .collect();
    let null_if_empty = |list: Vec<Value>| if list.is_empty() { Value::Null } else { list.into() };
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {
                "kubernetes.io/service-name": service,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": service}],
        },
        "addressType": if v6 { "IPv6" } else { "IPv4" },
        "ports": null_if_empty(ports),
        "endpoints": null_if_empty(endpoints.to_vec()),
    })
}

/// A running pod on a node, with these ports of its container.
pub fn pod(name: &str, node: &str, addresses: &[IpAddr], ports: &Value) -> Value {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"nodeName": node, "containers": [{"name": "server", "ports": ports}]},
        "status": {"phase": "Running", "podIP": addresses.first(), "podIPs": ips},
    })
}

/// A Node with its addresses and its zone, which has the node's name.
pub fn node(name: &str, addresses: &[IpAddr]) -> Value {
    let addresses: Vec<Value> =
        addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": name},
        },
        "status": {"addresses": addresses},
    })
}

/// Puts fields into an object; lists are merged element by element.
pub fn merge(object: &mut Value, fields: &Value) {
    match (object, fields) {
        (Value::Object(object), Value::Object(fields)) => {
            for (name, field) in fields {
                merge(object.entry(name).or_insert(Value::Null), field);
            }
        }
        (Value::Array(object), Value::Array(fields)) if object.len() == fields.len() => {
            object.iter_mut().zip(fields).for_each(|(object, field)| merge(object, field));
        }
        (object, fields) => *object = fields.clone(),
    }
}
